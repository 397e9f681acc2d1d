// State, the address that keeps it, and what a change of it redraws.

const DEFAULTS = {
  tab: "responses",
  response: 0,
  other: -1, // the response beside it; -1 for none
  token: 0,
  problem: "",
  source: "",
  correct: "",
  colour: "delta_logp",
  range: 0, // of the colours; 0 for the page's own
  alpha: 0.2,
  criterion: "delta_logp",
  tau: -0.3,
  fade: false,
  theme: "",
};
const NUMBERS = new Set(["token", "range", "alpha", "tau"]);

class App {
  constructor(manifest) {
    this.manifest = manifest;
    this.columns = new Array(manifest.responses.length).fill(null);
    this.state = { ...DEFAULTS };
    const rank = (source) => ["base", "rl", "given"].indexOf(source) >>> 0; // others come last
    this.sources = [...new Set(manifest.responses.map((r) => r.source))].sort(
      (a, b) => rank(a) - rank(b) || a.localeCompare(b, "en", { numeric: true }),
    );
    this.timings = {};
    // A page of short responses has room for large type.
    const longest = Math.max(...manifest.responses.map((r) => r.length));
    document.documentElement.classList.toggle("short", longest <= 160);
    this.list = new ResponseList(this);
    this.legend = new Legend(this);
    this.threshold = new Threshold(this);
    this.inspector = new Inspector($("inspector"), manifest.names);
    this.panes = [new Pane("left", this), new Pane("right", this)];
    $("panes").append(...this.panes.map((pane) => pane.element));
    this.active = this.panes[0];
    $("beside").addEventListener("change", (event) => {
      this.set({ other: event.target.checked ? this.partner(this.state.response) : -1 });
    });
    $("theme").addEventListener("click", () => {
      const order = ["", "light", "dark"];
      this.set({ theme: order[(order.indexOf(this.state.theme) + 1) % 3] });
    });
    this.prefersDark = matchMedia("(prefers-color-scheme: dark)");
    this.prefersDark.addEventListener("change", () => this.set({}, true));
    window.addEventListener("hashchange", () => this.restore());
    for (const tab of document.querySelectorAll('[role="tab"]')) {
      tab.addEventListener("click", () => this.set({ tab: tab.id.slice(4) }));
      tab.addEventListener("keydown", (event) => {
        if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
        const other = this.state.tab === "figures" ? "responses" : "figures";
        this.set({ tab: other });
        $(`tab-${other}`).focus();
      });
    }
    $("heading").textContent = manifest.title;
    $("note").textContent = manifest.note;
    $("tabs").hidden = manifest.figures.length === 0;
    const fold = () => ["rail-fold", "select-fold"].forEach((id) => ($(id).open = !NARROW.matches));
    NARROW.addEventListener("change", fold);
    fold();
    $("sheet").addEventListener("click", () => {
      const open = $("inspector").classList.toggle("open");
      $("sheet").setAttribute("aria-expanded", open);
      $("sheet").textContent = open ? "Less" : "More";
    });
    $("keys-open").addEventListener("click", () => $("keys").showModal());
    this.redrawStrips = oncePerFrame(() => this.drawStrips());
    new ResizeObserver(this.redrawStrips).observe($("list"));
  }

  // ---- names

  sourceName(source) {
    const [base, rl] = this.manifest.names;
    return { base, rl, given: "given" }[source] ?? source;
  }

  name(r) {
    return `${this.sourceName(r.source)}, sample ${r.sample}, ${verdict(r.correct)}`;
  }

  // ---- what panes ask for

  ruler(style) {
    const font = `${style.fontSize} ${style.fontFamily}`;
    if (this.rulerFont !== font) {
      this.rulerFont = font;
      this.ruling = new Ruler(this.manifest.words, font);
    }
    return this.ruling;
  }

  theme() {
    return this.state.theme || (this.prefersDark.matches ? "dark" : "light");
  }

  scale(measure, range) {
    const key = [measure, range, this.theme()].join();
    this.scales ??= new Map();
    if (!this.scales.has(key)) this.scales.set(key, new Scale(measure, range, this.theme()));
    return this.scales.get(key);
  }

  range(measure) {
    if (measure === "weight") return 1; // of 1 - p, the weight's part that differs
    return this.manifest.extents[measure].colour;
  }

  view() {
    const { colour, range, criterion, tau } = this.state;
    return {
      scale: this.scale(colour, range && colour !== "weight" ? range : this.range(colour)),
      values: (columns) => column(columns, colour),
      criterion: criterion === "none" ? null : (columns) => column(columns, criterion),
      selects: selector(criterion, tau),
    };
  }

  inspect(pane, token, spoken) {
    this.active = pane;
    for (const each of this.panes) each.element.classList.toggle("active", each === pane);
    if (pane === this.panes[0] && pane.hovered < 0 && this.state.token !== pane.focused) {
      this.state.token = pane.focused;
      this.remember();
    }
    const { selects, criterion, scale, values } = this.view();
    const place = scale.place(values(pane.columns)[token] ?? NaN);
    $("here").style.left = `${scale.signed ? 50 + 50 * place : 100 * place}%`;
    this.inspector.show(this.manifest.words, pane.response, pane.columns, token, {
      alpha: this.state.alpha,
      scale: this.scale("delta_logp", this.range("delta_logp")),
      selected: criterion !== null && selects(criterion(pane.columns)[token]),
      label: `${this.sourceName(pane.response.source)} ${pane.response.sample}`,
    });
    if (spoken) this.inspector.speak();
  }

  choose(pane, index) {
    if (pane === this.panes[0]) this.open(index);
    else this.set({ other: index });
  }

  jump(step) {
    const pane = this.active;
    if (pane.columns?.word.length) pane.focus(pane.selected(step));
  }

  // ---- responses

  // Opens a response; one shown beside it stays where it fits, else another takes its place.
  open(index) {
    const { other, response } = this.state;
    const { responses } = this.manifest;
    const fits = other >= 0 && other !== index && responses[other].problem === responses[index].problem;
    const beside = other < 0 ? -1 : other === index ? response : fits ? other : this.partner(index);
    this.set({ response: index, other: beside, token: 0, tab: "responses" });
    if (NARROW.matches) $("rail-fold").open = false;
  }

  // The response to put beside: of the same problem, by the other model, the same sample where there is one.
  partner(index) {
    const { responses } = this.manifest;
    const own = responses[index];
    const score = (r) => 2 * (r.source !== own.source) + (r.sample === own.sample);
    const candidates = responses.map((_, i) => i).filter((i) => i !== index && responses[i].problem === own.problem);
    candidates.sort((a, b) => score(responses[b]) - score(responses[a]) || a - b);
    return candidates[0] ?? -1;
  }

  passing() {
    const { problem, source, correct } = this.state;
    const passes = (r) =>
      (problem === "" || String(r.problem) === problem) &&
      (source === "" || r.source === source) &&
      (correct === "" || verdict(r.correct) === correct);
    const { responses } = this.manifest;
    return new Set(responses.map((_, i) => i).filter((i) => passes(responses[i])));
  }

  async read(index) {
    if (this.columns[index]) return this.columns[index];
    this.reading ??= new Map();
    if (!this.reading.has(index)) {
      const work = readColumns(this.manifest, index).then((columns) => {
        columns.source = this.manifest.responses[index].source;
        this.columns[index] = columns;
        return columns;
      });
      this.reading.set(index, work);
    }
    return this.reading.get(index);
  }

  async readAll() {
    for (let index = 0; index < this.columns.length; index++) {
      if (this.columns[index]) continue;
      await this.read(index);
      await new Promise((done) => setTimeout(done)); // the reader comes first
      if (index % 8 === 7) this.recount();
    }
    this.recount();
    this.redrawStrips();
    this.timings.all = performance.now();
  }

  // ---- state

  // `again`: draw everything, whether it has changed or not.
  async set(change, again = false) {
    const before = { ...this.state };
    Object.assign(this.state, change);
    const changed = (...names) => again || names.some((name) => before[name] !== this.state[name]);
    if (changed("problem", "source", "correct")) this.passingNow = this.passing();
    document.documentElement.dataset.theme = this.theme();
    $("theme").textContent = { "": "◐ Auto", light: "○ Light", dark: "● Dark" }[this.state.theme];
    this.drawTabs();
    const { response, other } = this.state;
    this.list.update(this.state, this.passingNow, [response, other]);
    $("panes").classList.toggle("two", other >= 0);
    $("panes").classList.toggle("fade", this.state.fade && this.state.criterion !== "none");
    $("beside").checked = other >= 0;
    $("beside").disabled = this.partner(response) < 0;
    this.remember();
    await this.showPanes();
    const { scale } = this.view();
    this.legend.update(this.state, scale);
    this.recount(changed("problem", "source", "correct", "criterion"));
    for (const pane of this.shownPanes()) pane.repaint();
    if (this.active.columns) this.active.report();
    if (changed("problem", "source", "correct", "colour", "range", "theme", "tab")) this.redrawStrips();
  }

  shownPanes() {
    return this.state.other >= 0 ? this.panes : this.panes.slice(0, 1);
  }

  async showPanes() {
    const { responses, prompts } = this.manifest;
    const shown = [this.state.response, this.state.other];
    const own = responses[shown[0]];
    $("which").textContent = `Problem ${own.problem}`;
    $("answer").textContent = own.answer === null ? "" : `answer ${own.answer}`;
    const prompt = prompts[own.prompt];
    $("prompt-start").textContent = excerpt(prompt);
    $("prompt").textContent = prompt;
    const choices = responses
      .map((r, value) => ({ r, value }))
      .filter(({ r }) => r.problem === own.problem)
      .map(({ r, value }) => ({ value, label: this.name(r) }));
    for (const [i, pane] of this.panes.entries()) {
      pane.element.hidden = shown[i] < 0;
      if (shown[i] < 0) continue;
      const columns = await this.read(shown[i]);
      const fresh = pane.index !== shown[i];
      pane.show(shown[i], responses[shown[i]], columns, choices);
      if (fresh && i === 0 && this.state.token > 0) pane.focus(this.state.token);
    }
    if (this.state.other < 0) this.active = this.panes[0];
  }

  recount(bins = true) {
    const indices = [...this.passingNow];
    const loaded = indices.map((i) => this.columns[i]).filter(Boolean);
    if (bins) this.threshold.count(this.state, loaded);
    this.threshold.update(this.state, loaded, indices.length - loaded.length);
    for (const pane of this.shownPanes()) {
      if (!pane.columns) continue;
      const length = pane.columns.word.length;
      const chosen = countSelected(pane.columns, this.state.criterion, this.state.tau);
      pane.facts.textContent =
        `${grouped(length)} tokens` + (this.state.criterion === "none" ? "" : ` · ${share(chosen, length)} selected`);
    }
  }

  drawStrips() {
    const view = this.view();
    for (const index of this.passingNow) {
      if (this.columns[index]) this.list.drawStrip(index, this.columns[index], view);
    }
  }

  drawTabs() {
    for (const name of ["responses", "figures"]) {
      const on = this.state.tab === name;
      $(`tab-${name}`).setAttribute("aria-selected", on);
      $(`tab-${name}`).tabIndex = on ? 0 : -1;
      $(name).hidden = !on;
    }
    if (this.state.tab === "figures" && !$("figures").childElementCount) {
      $("figures").append(
        ...this.manifest.figures.map(({ title, caption, svg }) => {
          // As an image a drawing can neither run nor fetch anything, and its ids are its own.
          const address = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
          const image = h("img", { src: address, alt: `${title}. ${caption}` });
          return h("figure", {}, h("figcaption", {}, h("h2", {}, title), h("p", {}, caption)), image);
        }),
      );
    }
  }

  // ---- the address

  key(index) {
    const r = this.manifest.responses[index];
    return r ? `${r.problem}:${r.sample}:${r.source}` : "";
  }

  // Browsers allow only so many changes of the address in a while.
  remember() {
    clearTimeout(this.remembering);
    this.remembering = setTimeout(() => this.writeAddress(), 150);
  }

  writeAddress() {
    const parts = new URLSearchParams();
    for (const [name, value] of Object.entries(this.state)) {
      if (name === "response" || name === "other") {
        if (value !== DEFAULTS[name]) parts.set(name, this.key(value));
      } else if (value !== DEFAULTS[name]) parts.set(name, String(value));
    }
    const hash = parts.size ? `#${parts}` : "";
    if (hash !== location.hash) history.replaceState(null, "", hash || location.pathname + location.search);
  }

  restore() {
    const parts = new URLSearchParams(location.hash.slice(1));
    const state = { ...DEFAULTS };
    for (const [name, text] of parts) {
      if (!Object.hasOwn(DEFAULTS, name)) continue;
      if (name === "response" || name === "other") {
        const found = this.manifest.responses.findIndex((_, i) => this.key(i) === text);
        if (found >= 0) state[name] = found;
      } else if (NUMBERS.has(name)) {
        if (text !== "" && Number.isFinite(Number(text))) state[name] = Number(text);
      } else if (name === "fade") state.fade = text === "true";
      else state[name] = text;
    }
    // An address is typed by people too: what names nothing falls back.
    if (!Object.hasOwn(MEASURES, state.colour)) state.colour = DEFAULTS.colour;
    const criteria = [...this.threshold.criterion.options].map((option) => option.value);
    if (!criteria.includes(state.criterion)) state.criterion = DEFAULTS.criterion;
    if (!["", "light", "dark"].includes(state.theme)) state.theme = "";
    if (state.tab !== "figures" || !this.manifest.figures.length) state.tab = "responses";
    for (const name of ["problem", "source", "correct"]) {
      if (![...$(name).options].some((option) => option.value === state[name])) state[name] = "";
    }
    const { responses } = this.manifest;
    const mismatched = state.other >= 0 && responses[state.other].problem !== responses[state.response].problem;
    if (mismatched || state.other === state.response) state.other = -1;
    return this.set(state, true);
  }
}

async function start() {
  const app = new App(await readManifest());
  window.microscope = app; // for the console, and for what measures the page
  await app.restore();
  document.documentElement.classList.add("ready");
  app.timings.first = performance.now();
  await app.readAll();
  document.documentElement.classList.add("complete");
}

start().catch((error) => {
  $("note").textContent = `This page could not be read: ${error.message}`;
  throw error;
});
