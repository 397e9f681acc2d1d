"""Renders chat templates in a process of its own: a script with a JSON request and a JSON reply per line.

`rlvr_jax.data.template` starts it by its path with `python -P`, so neither the package nor jax is imported. A template
is a program: sandboxed, but free to loop and to allocate. The kernel ends this process when a template computes for too
long, and refuses it memory beyond a limit.
"""

import json
import os
import resource
import signal
import sys


def limit_memory(more_mb):
    """Allows `more_mb` MiB beyond what the imports took (address space; macOS does not enforce it)."""
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        used = 0
    limit = used + more_mb * 2**20
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main():
    # The main process decides when to end; it closes the pipe.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    limits = json.loads(requests.readline())
    sys.path[:] = limits["path"]
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory(limits["memory_mb"])
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
        try:
            text = render_jinja_template(
                [request["messages"]], chat_template=request["template"], **request["arguments"]
            )
            text = text[0][0]
            if len(text) > limits["characters"]:
                raise ValueError(f"it writes {len(text):,} characters, expected at most {limits['characters']:,}")
            reply = {"text": text}
        except jinja2.TemplateError as error:
            reply = {"error": f"{error}"[:500]}
        except BaseException as error:  # MemoryError and RecursionError too
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
