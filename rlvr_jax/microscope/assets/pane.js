// One response: a scrolling text of which only the lines in view exist, and a map of the whole beside it.

const OVERSCAN = 12; // lines kept ready above and below the view

class Pane {
  // `app` gives: ruler(), view() -> {scale, values(columns), selects, criterion}, and hears inspect(), choose().
  constructor(id, app) {
    this.id = id;
    this.app = app;
    this.focused = 0;
    this.hovered = -1;
    this.elements = []; // of the lines from this.top on
    this.top = 0;
    this.picker = h("select", { class: "picker", "aria-label": "Response shown", onchange: () => this.pick() });
    this.facts = h("p", { class: "facts" });
    this.lines = h("div", { class: "lines", role: "presentation" });
    this.text = h(
      "div",
      { class: "text", id, tabindex: "0", role: "listbox", "aria-orientation": "horizontal" },
      this.lines,
    );
    this.map = h("canvas", { class: "map", "aria-hidden": "true" });
    this.lens = h("div", { class: "lens", "aria-hidden": "true" });
    this.mapBox = h("div", { class: "mapbox" }, this.map, this.lens);
    this.element = h(
      "section",
      { class: "pane" },
      h("header", {}, this.picker, this.facts),
      h("div", { class: "view" }, this.text, this.mapBox),
    );
    this.text.addEventListener("scroll", () => this.render(), { passive: true });
    this.text.addEventListener("keydown", (event) => this.key(event));
    this.text.addEventListener("focus", () => this.report());
    this.text.addEventListener("pointerover", (event) => this.hover(event.target.token ?? -1));
    this.text.addEventListener("pointerleave", () => this.hover(-1));
    this.text.addEventListener("click", (event) => {
      if (event.target.token !== undefined) this.focus(event.target.token);
    });
    this.mapBox.addEventListener("wheel", (event) => this.text.scrollBy(0, event.deltaY), { passive: true });
    for (const kind of ["pointerdown", "pointermove"]) {
      this.mapBox.addEventListener(kind, (event) => event.buttons & 1 && this.jump(event));
    }
    new ResizeObserver(oncePerFrame(() => this.relayout())).observe(this.text);
    this.repaintMap = oncePerFrame(() => this.drawMap());
  }

  show(index, response, columns, choices) {
    this.picker.replaceChildren(
      ...choices.map(({ value, label }) => h("option", { value, selected: value === index }, label)),
    );
    if (this.index !== index) {
      this.index = index;
      this.response = response;
      this.columns = columns;
      this.focused = 0;
      this.hovered = -1;
      this.width = 0;
      this.text.scrollTop = 0;
    }
    this.text.setAttribute("aria-label", `Tokens: ${this.app.name(response)}`);
    this.relayout();
  }

  pick() {
    this.app.choose(this, Number(this.picker.value));
  }

  // Lines again, where the width has changed; the first line in view stays the first.
  relayout() {
    if (!this.columns) return;
    const style = getComputedStyle(this.text);
    const width = this.text.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - 2;
    if (width < 40) return;
    this.lineHeight = parseFloat(style.lineHeight);
    // Kept, so that scrolling never has to ask for them: that would lay the page out twice a frame.
    this.height = this.text.clientHeight;
    this.mapHeight = this.mapBox.clientHeight;
    if (width !== this.width) {
      const anchor = this.layout ? this.layout.token[this.layout.first[this.lineAt(this.text.scrollTop)]] : 0;
      const keep = this.width > 0;
      this.width = width;
      this.layout = breakLines(this.columns.word, this.app.ruler(style), width);
      this.lines.style.height = `${this.layout.lines * this.lineHeight}px`;
      if (keep) this.text.scrollTop = this.layout.line[anchor ?? 0] * this.lineHeight;
      this.clear();
    }
    this.render();
    this.repaintMap();
  }

  lineAt(y) {
    return Math.max(0, Math.min(this.layout.lines - 1, Math.floor(y / this.lineHeight)));
  }

  clear() {
    this.lines.replaceChildren();
    this.elements = [];
  }

  render() {
    if (!this.layout) return;
    const scrolled = this.text.scrollTop;
    const top = Math.max(0, this.lineAt(scrolled) - OVERSCAN);
    const bottom = Math.min(this.layout.lines, this.lineAt(scrolled + this.height) + 1 + OVERSCAN);
    let end = this.top + this.elements.length;
    if (top >= end || bottom <= this.top) {
      this.clear();
      this.top = end = top;
    }
    while (this.top < top) {
      this.elements.shift().remove();
      this.top++;
    }
    while (end > bottom) {
      this.elements.pop().remove();
      end--;
    }
    const view = this.app.view();
    const values = view.values(this.columns);
    const above = [];
    for (let line = top; line < this.top; line++) above.push(this.line(line, view, values));
    const below = [];
    for (let line = Math.max(end, this.top); line < bottom; line++) below.push(this.line(line, view, values));
    if (above.length) this.lines.prepend(...above);
    if (below.length) this.lines.append(...below);
    this.elements = [...above, ...this.elements, ...below];
    this.top = top;
    this.drawLens(scrolled);
  }

  line(line, view, values) {
    const { first, token, text, mark, start } = this.layout;
    const element = document.createElement("div");
    element.className = "line";
    element.dir = "auto";
    element.setAttribute("role", "presentation");
    element.style.top = `${line * this.lineHeight}px`;
    for (let i = first[line]; i < first[line + 1]; i++) {
      const span = document.createElement("span");
      span.textContent = text[i];
      span.token = token[i];
      span.mark = mark[i];
      if (start[token[i]] === i) {
        span.id = `${this.id}-${token[i]}`;
        span.setAttribute("role", "option");
      }
      this.paint(span, view, values);
      element.append(span);
    }
    return element;
  }

  paint(span, view, values) {
    const { token } = span;
    const focused = token === this.focused;
    const selected = view.selects(view.criterion ? view.criterion(this.columns)[token] : NaN);
    span.className =
      (span.mark ? "t mark" : "t") +
      (selected ? " chosen" : "") +
      (focused ? " on" : "") +
      (token === this.hovered ? " under" : "");
    const colour = view.scale.colour(values[token]);
    if (colour || span.style.length) span.style.backgroundColor = colour;
    if (!span.id || focused === span.hasAttribute("aria-posinset")) return;
    // Only the focused token is spoken of, so only it says where it is.
    const places = { "aria-selected": true, "aria-posinset": token + 1, "aria-setsize": this.columns.word.length };
    for (const [name, value] of Object.entries(places)) {
      if (focused) span.setAttribute(name, value);
      else span.removeAttribute(name);
    }
  }

  // Colours and outlines again: what a changed measure, range, threshold or theme asks for.
  repaint() {
    if (!this.layout) return;
    const view = this.app.view();
    const values = view.values(this.columns);
    for (const line of this.elements) for (const span of line.children) this.paint(span, view, values);
    this.repaintMap();
  }

  repaintToken(token) {
    if (token < 0 || !this.layout) return;
    const view = this.app.view();
    const values = view.values(this.columns);
    const line = this.layout.line[token] - this.top;
    // A token lies on its first line and, where it is long or holds newlines, on those after it.
    for (let i = Math.max(0, line); i < this.elements.length; i++) {
      const own = [...this.elements[i].children].filter((span) => span.token === token);
      for (const span of own) this.paint(span, view, values);
      if (!own.length && i > line) break;
    }
  }

  hover(token) {
    if (token === this.hovered) return;
    const before = this.hovered;
    this.hovered = token;
    this.repaintToken(before);
    this.repaintToken(token);
    this.report();
  }

  focus(token, { scroll = true } = {}) {
    const length = this.columns.word.length;
    const before = this.focused;
    this.focused = Math.max(0, Math.min(length - 1, Math.round(token)));
    if (scroll && this.layout && length) this.reveal(this.focused);
    this.repaintToken(before);
    this.repaintToken(this.focused);
    this.report(true);
  }

  // Scrolls as little as shows the token's line with two lines around it.
  reveal(token) {
    const y = this.layout.line[token] * this.lineHeight;
    const margin = 2 * this.lineHeight;
    const { height } = this;
    const top = this.text.scrollTop;
    if (y - margin < top) this.text.scrollTop = y - margin;
    else if (y + this.lineHeight + margin > top + height) this.text.scrollTop = y + this.lineHeight + margin - height;
    this.render();
  }

  report(spoken = false) {
    if (!this.columns) return;
    const length = this.columns.word.length;
    if (length) this.text.setAttribute("aria-activedescendant", `${this.id}-${this.focused}`);
    this.app.inspect(this, this.hovered >= 0 ? this.hovered : this.focused, spoken);
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !this.columns.word.length || !this.layout) return;
    const page = Math.max(1, Math.floor(this.height / this.lineHeight) - 2);
    const moves = {
      ArrowRight: () => this.focused + 1,
      ArrowLeft: () => this.focused - 1,
      ArrowDown: () => this.beside(1),
      ArrowUp: () => this.beside(-1),
      PageDown: () => this.beside(page),
      PageUp: () => this.beside(-page),
      Home: () => 0,
      End: () => this.columns.word.length - 1,
      n: () => this.selected(1),
      p: () => this.selected(-1),
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.hovered = -1;
    this.focus(moves[event.key]());
  }

  // The token `lines` further down whose middle is nearest to the focused one's.
  beside(lines) {
    const { first, token, x, width, start, line } = this.layout;
    const from = start[this.focused];
    const middle = x[from] + width[from] / 2;
    const step = Math.sign(lines);
    let to = Math.max(0, Math.min(this.layout.lines - 1, line[this.focused] + lines));
    while (first[to] === first[to + 1] && to + step >= 0 && to + step < this.layout.lines) to += step;
    let best = -1;
    for (let i = first[to]; i < first[to + 1]; i++) {
      const distance = Math.abs(x[i] + width[i] / 2 - middle);
      if (best < 0 || distance < Math.abs(x[best] + width[best] / 2 - middle)) best = i;
    }
    return best < 0 ? this.focused : token[best];
  }

  // The next selected token in that direction, or the focused one where there is none.
  selected(step) {
    const { selects, criterion } = this.app.view();
    if (!criterion) return this.focused;
    const values = criterion(this.columns);
    for (let i = this.focused + step; i >= 0 && i < values.length; i += step) if (selects(values[i])) return i;
    return this.focused;
  }

  jump(event) {
    const box = this.mapBox.getBoundingClientRect();
    const { rows, height } = this.mapScale();
    const line = (event.clientY - box.top) / (height / rows);
    this.text.scrollTop = line * this.lineHeight - this.height / 2;
    event.preventDefault();
  }

  // The map shows `rows` lines on `height` pixels: short responses are not stretched.
  mapScale() {
    return { rows: this.layout.lines, height: Math.min(this.mapHeight, this.layout.lines * 4) };
  }

  drawMap() {
    const sized = this.layout && sizedCanvas(this.map);
    if (!sized) return;
    const { context, width } = sized;
    const view = this.app.view();
    const values = view.values(this.columns);
    const criterion = view.criterion && view.criterion(this.columns);
    const { rows, height } = this.mapScale();
    const row = height / rows;
    const across = (width - 7) / this.width;
    const thick = Math.max(1, row - (row > 2 ? 1 : 0));
    const { token, x, width: wide, first, mark } = this.layout;
    const ink = cssColour("--ink");
    const draw = (strong) => {
      for (let line = 0; line < rows; line++) {
        for (let i = first[line]; i < first[line + 1]; i++) {
          const place = Math.abs(view.scale.place(values[token[i]]));
          if (mark[i] || place > 0.5 !== strong) continue;
          const colour = view.scale.vivid(values[token[i]]);
          context.globalAlpha = colour ? 1 : 0.1;
          context.fillStyle = colour || ink;
          context.fillRect(x[i] * across, line * row, Math.max(strong ? 2 : 1, wide[i] * across), thick);
        }
      }
    };
    draw(false);
    draw(true); // last, so that no neighbour hides it
    context.globalAlpha = 0.75;
    context.fillStyle = ink;
    for (let line = 0; criterion && line < rows; line++) {
      for (let i = first[line]; i < first[line + 1]; i++) {
        if (!view.selects(criterion[token[i]])) continue;
        context.fillRect(width - 4, line * row, 4, Math.max(1, thick));
        break;
      }
    }
    this.drawLens(this.text.scrollTop);
  }

  drawLens(scrolled) {
    const { rows, height } = this.mapScale();
    const perPixel = height / (rows * this.lineHeight);
    this.lens.style.top = `${scrolled * perPixel}px`;
    this.lens.style.height = `${Math.min(height, this.height * perPixel)}px`;
  }
}
