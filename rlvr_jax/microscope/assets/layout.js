// Lines of tokens. The page breaks lines itself, from measured widths, so that every line has one known place: only the
// lines in view are ever in the document, and the scrollbar is exact from the start.

const IDEOGRAPHS = /^[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]/;
const MARK = 1; // a fragment that stands for something invisible: a newline, a tab, an empty token

// The pieces of a token's text that may stand on different lines, and the width of each.
class Ruler {
  constructor(words, font) {
    this.words = words;
    this.context = document.createElement("canvas").getContext("2d");
    this.context.font = font;
    this.context.fontKerning = "none";
    this.context.textRendering = "geometricPrecision";
    this.forms = new Map();
    this.space = this.width(" ");
  }

  width(text) {
    return this.context.measureText(text).width;
  }

  form(word) {
    let form = this.forms.get(word);
    if (form) return form;
    const text = this.words.texts[word];
    const parts = [];
    if (text === "") parts.push({ text: "◌", mark: MARK, newline: false });
    substitute(text)
      .split(/(\n|\t)/)
      .forEach((part) => {
        if (part === "\n") parts.push({ text: "↵", mark: MARK, newline: true });
        else if (part === "\t") parts.push({ text: "⇥  ", mark: MARK, newline: false });
        else if (part !== "") parts.push({ text: part, mark: 0, newline: false });
      });
    for (const part of parts) part.width = this.width(part.text);
    form = { parts, opens: /^\s/.test(text) || IDEOGRAPHS.test(text), closes: /[\s\u2014\u2013-]$/.test(text) };
    this.forms.set(word, form);
    return form;
  }
}

// Breaks the tokens into lines of at most `width` pixels. Gives, a fragment (a part of a token on one line): its token,
// text, left edge, width and whether it is a mark; a line: its first fragment; a token: its first fragment and line.
function breakLines(word, ruler, width) {
  const out = { token: [], text: [], x: [], width: [], mark: [], first: [0], start: [], line: new Int32Array(word.length) };
  let x = 0;
  let chance = -1; // the newest fragment of this line before which it may break
  let closed = false;

  const lineStart = () => out.first[out.first.length - 1];

  function push(token, text, partWidth, mark) {
    out.token.push(token);
    out.text.push(text);
    out.x.push(x);
    out.width.push(partWidth);
    out.mark.push(mark);
    x += partWidth;
  }

  function newLine(at) {
    out.first.push(at);
    x = 0;
    chance = -1;
    // What wraps begins at the left edge: its space stays behind, at the end of the line before.
    for (let i = at; i < out.token.length; i++) {
      if (i === at && out.text[i].startsWith(" ") && out.text[i].length > 1 && !out.mark[i]) {
        out.text[i] = out.text[i].slice(1);
        out.width[i] -= ruler.space;
      }
      out.x[i] = x;
      x += out.width[i];
    }
  }

  for (let token = 0; token < word.length; token++) {
    const form = ruler.form(word[token]);
    out.start.push(out.token.length);
    form.parts.forEach((part, index) => {
      const here = out.token.length;
      if (here > lineStart() && ((index === 0 && form.opens) || closed)) chance = here;
      const overflows = x + part.width > width && here > lineStart() && !part.newline;
      push(token, part.text, part.width, part.mark);
      if (overflows) newLine(chance > lineStart() ? chance : here);
      if (x > width && out.width[out.width.length - 1] > width) splitLast(token, part.mark);
      closed = false;
      if (part.newline) newLine(out.token.length);
    });
    closed = form.closes;
  }

  // A part that is wider than a line continues on the next ones.
  function splitLast(token, mark) {
    const last = out.token.length - 1;
    const characters = [...out.text[last]];
    const size = Math.max(1, Math.floor((characters.length * width) / out.width[last]));
    const unit = out.width[last] / characters.length;
    out.text[last] = characters.slice(0, size).join("");
    out.width[last] = size * unit;
    for (let from = size; from < characters.length; from += size) {
      const text = characters.slice(from, from + size).join("");
      newLine(out.token.length);
      push(token, text, text.length * unit, mark);
    }
  }

  out.lines = out.first.length;
  out.first.push(out.token.length);
  for (let line = 0; line < out.lines; line++) {
    for (let i = out.first[line + 1] - 1; i >= out.first[line]; i--) {
      if (out.start[out.token[i]] === i) out.line[out.token[i]] = line;
    }
  }
  return out;
}
