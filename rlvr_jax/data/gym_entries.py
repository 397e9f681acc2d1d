"""A script that makes reasoning-gym problems: `[[task, config], ...]` on stdin, one JSON array a problem on stdout.

It is a process of its own because some tasks depend on Python's hash seed, which is fixed only where a process starts,
and some draw from the global random numbers, which are set here before each problem as they are in the grading worker.
"""

import json
import random
import sys


def main() -> None:
    """Writes `[task, index, question, answer]` for every problem, or `{"error": reason}` and ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # tasks may print
    import reasoning_gym

    for task, config in json.load(sys.stdin):
        try:
            random.seed(0)
            dataset = reasoning_gym.create_dataset(task, **config)
            for index in range(len(dataset)):
                random.seed(0)
                entry = dataset[index]
                out.write(json.dumps([task, index, entry["question"], entry.get("answer")], default=str) + "\n")
        except Exception as error:  # tasks check their configuration by assert, and some while they make the problems
            out.write(json.dumps({"error": f"{task} with {config}: {type(error).__name__}: {error}"}) + "\n")
            return


if __name__ == "__main__":
    main()
