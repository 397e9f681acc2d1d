// The list of responses with its filters, the colours' legend, and the threshold over its histogram.

const BINS = 96;
const verdict = (correct) => (correct === null ? "not graded" : correct ? "right" : "wrong");

// ---- filters and list ----------------------------------------------------------------------------------------------

class ResponseList {
  constructor(app) {
    this.app = app;
    this.rows = new Map();
    const { responses, prompts } = app.manifest;
    const problems = [...new Set(responses.map((r) => r.problem))];
    this.problem = $("problem");
    this.problem.append(
      h("option", { value: "" }, `All ${grouped(problems.length)} problems`),
      ...problems.map((p) => h("option", { value: p }, `Problem ${p}`)),
    );
    this.source = $("source");
    this.source.append(
      h("option", { value: "" }, "Any model"),
      ...app.sources.map((s) => h("option", { value: s }, app.sourceName(s))),
    );
    this.correct = $("correct");
    for (const [name, select] of Object.entries({ problem: this.problem, source: this.source, correct: this.correct })) {
      select.addEventListener("change", () => app.set({ [name]: select.value }));
    }
    const list = $("list");
    for (const problem of problems) {
      const own = responses.map((r, index) => [r, index]).filter(([r]) => r.problem === problem);
      const start = excerpt(prompts[own[0][0].prompt]);
      list.append(
        h(
          "section",
          { "data-problem": problem },
          h("h3", {}, `Problem ${problem}`, h("span", { dir: "auto" }, start)),
          h("ul", {}, ...own.map(([r, index]) => this.row(r, index))),
        ),
      );
    }
  }

  row(response, index) {
    const strip = h("canvas", { class: "strip", "aria-hidden": "true" });
    const button = h(
      "button",
      { type: "button", onclick: () => this.app.open(index) },
      h("span", { class: "who" }, this.app.sourceName(response.source), h("small", {}, ` ${response.sample}`)),
      h(
        "span",
        { class: `verdict ${verdict(response.correct)}`, title: verdict(response.correct) },
        response.correct === null ? "–" : verdict(response.correct),
      ),
      h("span", { class: "length" }, grouped(response.length)),
      strip,
    );
    const item = h("li", {}, button);
    this.rows.set(index, { item, button, strip });
    return item;
  }

  // Which responses pass the filters; the list shows those.
  update(state, passing, current) {
    for (const name of ["problem", "source", "correct"]) this[name].value = state[name];
    for (const [index, { item, button }] of this.rows) {
      item.hidden = !passing.has(index);
      if (current.includes(index)) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    for (const section of $("list").children) {
      section.hidden = [...section.querySelectorAll("li")].every((item) => item.hidden);
    }
    $("none").hidden = passing.size > 0;
    $("count").textContent = `${grouped(passing.size)} of ${grouped(this.rows.size)} responses`;
  }

  // The response at a glance: in every bin the root mean square, with the sign that weighs more.
  drawStrip(index, columns, view) {
    const sized = sizedCanvas(this.rows.get(index).strip);
    if (!sized) return;
    const { context, width, height } = sized;
    const values = view.values(columns);
    const bins = Math.max(1, Math.min(Math.floor(width / 2), values.length));
    for (let bin = 0; bin < bins; bin++) {
      const [from, to] = [bin, bin + 1].map((edge) => Math.floor((edge * values.length) / bins));
      let squares = 0;
      let balance = 0;
      for (let i = from; i < to; i++) {
        const place = view.scale.place(values[i]);
        squares += place * place;
        balance += place * Math.abs(place);
      }
      const size = Math.sqrt(squares / Math.max(1, to - from)) * view.scale.range;
      context.fillStyle = view.scale.vivid(balance < 0 ? -size : size) || cssColour("--strip");
      context.fillRect((bin * width) / bins, 0, width / bins - (bins * 3 < width ? 1 : 0), height);
    }
  }
}

// ---- colours -------------------------------------------------------------------------------------------------------

class Legend {
  constructor(app) {
    this.app = app;
    this.variant = $("variant");
    this.alpha = $("alpha");
    this.range = $("range");
    const [base, rl] = app.manifest.names;
    this.labels = {
      entropy_rl: `of ${rl}`,
      entropy_base: `of ${base}`,
      kl: `KL(${rl} ‖ ${base})`,
      kl_reverse: `KL(${base} ‖ ${rl})`,
      js: "average of both",
      js_true: "Jensen–Shannon",
    };
    for (const input of document.querySelectorAll('input[name="measure"]')) {
      input.addEventListener("change", () => {
        const first = Object.keys(MEASURES).find((name) => MEASURES[name].group === input.value);
        app.set({ colour: first, range: 0 });
      });
    }
    this.variant.addEventListener("change", () => app.set({ colour: this.variant.value, range: 0 }));
    this.alpha.addEventListener("input", () => app.set({ alpha: Number(this.alpha.value) }));
    this.range.addEventListener("change", () => {
      const value = Number(this.range.value);
      app.set({ range: value > 0 ? value : 0 });
    });
  }

  update(state, scale) {
    const { group, unit, signed } = MEASURES[state.colour];
    const [base, rl] = this.app.manifest.names;
    document.querySelector(`input[name="measure"][value="${group}"]`).checked = true;
    const variants = Object.keys(MEASURES).filter((name) => MEASURES[name].group === group);
    this.variant.parentElement.hidden = variants.length < 2;
    this.variant.replaceChildren(
      ...variants.map((name) => h("option", { value: name, selected: name === state.colour }, this.labels[name] ?? "")),
    );
    const weighs = group === "weight";
    $("alpha-box").hidden = !weighs;
    $("range-box").hidden = weighs;
    $("range-sign").textContent = signed ? "range ±" : "range 0 to";
    this.alpha.value = state.alpha;
    $("alpha-value").textContent = state.alpha.toFixed(2);
    this.range.value = scale.range;
    $("gradient").style.backgroundImage = scale.gradient();
    const digits = scale.range >= 10 ? 0 : scale.range >= 1 ? 1 : 2;
    const edge = (value, sign) => decimal(value, digits, sign);
    const ticks = signed
      ? [edge(-scale.range), "0", `${edge(scale.range, true)} ${unit}`]
      : weighs
        ? ["1", (1 + state.alpha / 2).toFixed(2), (1 + state.alpha).toFixed(2)]
        : ["0", edge(scale.range / 2), `${edge(scale.range)} ${unit}`];
    [...$("ticks").children].forEach((tick, i) => (tick.textContent = ticks[i]));
    $("meaning").textContent = {
      delta: `log p of ${rl} less log p of ${base}`,
      entropy: "of the distribution the token was drawn from",
      kl: "between the two models’ next-token distributions",
      weight: "the training weight 1 + α(1 − p), p of the model that wrote it",
    }[group];
    $("ends").hidden = !signed;
    $("less").textContent = `less probable under ${rl}`;
    $("more").textContent = `more probable under ${rl}`;
  }
}

// ---- threshold -----------------------------------------------------------------------------------------------------

class Threshold {
  constructor(app) {
    this.app = app;
    this.criterion = $("criterion");
    this.number = $("tau");
    this.slider = $("slider");
    this.canvas = $("histogram");
    const [base, rl] = app.manifest.names;
    const names = {
      delta_logp: "Δlog p ≤ τ",
      neg_delta_logp: "−Δlog p ≤ τ",
      abs_delta_logp: "|Δlog p| ≥ τ",
      entropy_base: `entropy of ${base} ≥ τ`,
      entropy_rl: `entropy of ${rl} ≥ τ`,
      kl: `KL(${rl} ‖ ${base}) ≥ τ`,
      kl_reverse: `KL(${base} ‖ ${rl}) ≥ τ`,
      js: "JS, average of both ≥ τ",
      js_true: "Jensen–Shannon ≥ τ",
      none: "none",
    };
    this.criterion.append(...Object.entries(names).map(([value, label]) => h("option", { value }, label)));
    this.criterion.addEventListener("change", () => {
      const criterion = this.criterion.value;
      app.set({ criterion, tau: this.start(criterion) });
    });
    const move = (input) => {
      const tau = Number(input.value);
      if (input.value !== "" && Number.isFinite(tau)) app.set({ tau });
    };
    this.number.addEventListener("change", () => move(this.number));
    this.slider.addEventListener("input", () => move(this.slider));
    $("fade").addEventListener("change", (event) => app.set({ fade: event.target.checked }));
    $("previous").addEventListener("click", () => app.jump(-1));
    $("next").addEventListener("click", () => app.jump(1));
    new ResizeObserver(oncePerFrame(() => this.draw())).observe(this.canvas);
  }

  // [low, high] of the slider.
  span(criterion) {
    const { extents } = this.app.manifest;
    const { low, high } = extents[criterion] ?? extents.delta_logp;
    if (criterion === "neg_delta_logp") return [-high, -low];
    return criterion === "abs_delta_logp" ? [0, Math.max(-low, high)] : [low, high];
  }

  // Where a criterion's threshold begins: the paper's -0.3 nats for dlogp, else what 5% of the tokens reach.
  start(criterion) {
    if (criterion.endsWith("delta_logp")) return criterion === "abs_delta_logp" ? 0.3 : -0.3;
    return criterion === "none" ? 0 : this.app.manifest.extents[criterion].start;
  }

  // Counts again: another criterion, other filters, or more responses read.
  count(state, loaded) {
    this.counts = null;
    if (state.criterion !== "none") {
      const [low, high] = this.span(state.criterion);
      this.counts = new Float64Array(BINS);
      for (const columns of loaded) {
        const values = column(columns, state.criterion);
        const scale = BINS / (high - low);
        for (let i = 0; i < values.length; i++) {
          const bin = Math.floor((values[i] - low) * scale);
          if (bin === bin) this.counts[bin < 0 ? 0 : bin >= BINS ? BINS - 1 : bin]++;
        }
      }
    }
  }

  update(state, loaded, pending) {
    const { criterion, tau } = state;
    const none = criterion === "none";
    this.criterion.value = criterion;
    for (const input of [this.number, this.slider, $("previous"), $("next"), $("fade")]) input.disabled = none;
    $("fade").checked = state.fade;
    const [low, high] = this.span(criterion);
    const step = high - low > 20 ? 0.1 : high - low > 2 ? 0.01 : 0.001;
    Object.assign(this.slider, { min: low, max: high, step, value: tau });
    this.slider.setAttribute("aria-valuetext", `${decimal(tau, 3)}`);
    this.number.step = step;
    if (document.activeElement !== this.number || Number(this.number.value) !== tau) this.number.value = none ? "" : tau;
    let [chosen, all] = [0, 0];
    const of = new Map(this.app.sources.map((source) => [source, [0, 0]])); // source -> [selected, all]
    for (const columns of loaded) {
      const count = countSelected(columns, criterion, tau);
      const own = of.get(columns.source);
      of.set(columns.source, [own[0] + count, own[1] + columns.word.length]);
      chosen += count;
      all += columns.word.length;
    }
    const each = [...of].filter(([, counts]) => counts[1]).map(([source, counts]) => `${this.app.sourceName(source)} ${share(...counts)}`);
    $("by-source").textContent = none || each.length < 2 || each.length > 3 ? "" : each.join(" · ");
    const named = this.criterion.selectedOptions[0].textContent;
    $("select-now").textContent = none ? "none" : `${named.replace("τ", decimal(tau, 2))} · ${share(chosen, all)}`;
    $("share").textContent = none ? "–" : share(chosen, all);
    $("of").textContent = none
      ? `${grouped(all)} tokens`
      : `${grouped(chosen)} of ${grouped(all)} tokens${pending ? `, ${pending} responses still to read` : ""}`;
    this.state = state;
    this.draw();
  }

  draw() {
    const sized = this.state && sizedCanvas(this.canvas);
    if (!sized || !this.counts) return;
    const { context, width, height } = sized;
    const [low, high] = this.span(this.state.criterion);
    const selects = selector(this.state.criterion, this.state.tau);
    const most = Math.log1p(Math.max(...this.counts));
    // The slider's thumb stops half its width before either end, and the bars with it.
    const [left, inner] = [8, width - 16];
    for (let bin = 0; bin < BINS; bin++) {
      const tall = most ? (Math.log1p(this.counts[bin]) / most) * height : 0;
      const middle = low + ((bin + 0.5) * (high - low)) / BINS;
      context.fillStyle = cssColour(selects(middle) ? "--ink" : "--bar");
      context.fillRect(left + (bin * inner) / BINS, height - tall, inner / BINS - 0.75, tall);
    }
    const at = left + (inner * (Math.min(high, Math.max(low, this.state.tau)) - low)) / (high - low);
    context.fillStyle = cssColour("--ink");
    context.fillRect(at - 0.5, 0, 1, height);
  }
}
