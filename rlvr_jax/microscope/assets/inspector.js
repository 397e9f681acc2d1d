// The numbers of one token, and what either model would rather have said.

class Inspector {
  constructor(root, names) {
    this.names = names;
    const cell = () => h("td");
    this.token = h("p", { class: "token", dir: "auto" });
    this.place = h("p", { class: "place" });
    this.delta = h("p", { class: "delta" });
    this.meaning = h("p", { class: "meaning" });
    this.pin = h("i", { class: "pin" });
    this.rule = h("div", { class: "rule", "aria-hidden": "true" }, this.pin);
    this.cells = {};
    const row = (name, label) => {
      this.cells[name] = [cell(), cell()];
      return h("tr", {}, h("th", { scope: "row" }, label), ...this.cells[name]);
    };
    this.table = h(
      "table",
      {},
      h("caption", { class: "hidden" }, "The token under both models"),
      h(
        "thead",
        {},
        h("tr", {}, h("td"), h("th", { scope: "col" }, names[0]), h("th", { scope: "col" }, names[1])),
      ),
      h(
        "tbody",
        {},
        row("p", "Probability"),
        row("logp", "log p"),
        row("rank", "Rank"),
        row("entropy", "Entropy"),
      ),
    );
    this.singles = {};
    const single = (name, label, title) => {
      this.singles[name] = h("dd");
      return [h("dt", { title }, label), this.singles[name]];
    };
    this.list = h(
      "dl",
      {},
      ...single("kl", `KL(${names[1]} ‖ ${names[0]})`),
      ...single("kl_reverse", `KL(${names[0]} ‖ ${names[1]})`),
      ...single("js", "JS, average of both"),
      ...single("js_true", "Jensen–Shannon"),
      ...single("weight", "Weight 1 + α(1 − p)", "p under the model that wrote the response"),
      ...single("gradient_share", "Gradient share", "of the response's sum of 1 − p; 1× is an even share"),
    );
    this.tops = names.map((name) => h("ol", { "aria-label": `The most probable tokens of ${name}` }));
    this.parts = [
      h("div", { class: "shift" }, this.delta, this.meaning, this.rule),
      this.table,
      this.list,
      h(
        "div",
        { class: "tops" },
        ...names.map((name, i) => h("section", {}, h("h3", {}, `${name} would say`), this.tops[i])),
      ),
    ];
    root.append(h("div", { class: "who" }, this.token, this.place), ...this.parts);
    this.spoken = $("spoken");
  }

  // `range` is that of the dlogp colours; `scale` colours the rule.
  show(words, response, columns, i, { alpha, scale, selected, label }) {
    const length = columns.word.length;
    for (const part of this.parts) part.hidden = !length;
    if (!length) {
      this.token.textContent = "";
      this.place.textContent = `${label}: a response without tokens`;
      this.sayable = this.place.textContent;
      return;
    }
    const word = columns.word[i];
    const delta = column(columns, "delta_logp")[i];
    this.token.replaceChildren(...shown(words.texts[word]));
    this.place.textContent = `${grouped(i + 1)} of ${grouped(length)} · id ${words.ids[word]} · ${label}`;
    this.delta.replaceChildren(this.size(delta), h("small", {}, "nats"));
    this.meaning.textContent = this.sentence(delta);
    this.rule.style.backgroundImage = scale.gradient();
    this.pin.style.left = `${50 + 50 * scale.place(delta)}%`;
    const fill = (name, text) => {
      this.cells[name][0].textContent = text(columns[`${name}_base`], this.names[0]);
      this.cells[name][1].textContent = text(columns[`${name}_rl`], this.names[1]);
    };
    this.cells.p[0].textContent = percent(Math.exp(columns.logp_base[i]));
    this.cells.p[1].textContent = percent(Math.exp(columns.logp_rl[i]));
    fill("logp", (values) => decimal(values[i], 2));
    fill("rank", (values) => grouped(values[i]));
    fill("entropy", (values) => decimal(values[i], 2));
    for (const name of ["kl", "kl_reverse", "js", "js_true"]) {
      this.singles[name].textContent = decimal(columns[name][i], 3);
    }
    this.singles.weight.textContent = decimal(1 + alpha * column(columns, "weight")[i], 3);
    const part = columns.gradient_share[i];
    this.singles.gradient_share.textContent = `${percent(part)} (${decimal(part * length, 1)}×)`;
    this.alternatives(0, words, columns.top_base, columns.top_base_logp, i, length, word);
    this.alternatives(1, words, columns.top_rl, columns.top_rl_logp, i, length, word);
    this.sayable =
      `${visible(words.texts[word])}, token ${i + 1} of ${length}. ` +
      `Delta log p ${this.size(delta)} nats. ` +
      `${this.names[0]} ${this.cells.p[0].textContent}, ${this.names[1]} ${this.cells.p[1].textContent}` +
      (selected ? ". Selected." : ".");
  }

  // Small differences with a digit more; what rounds to nothing is nothing.
  size(delta) {
    if (Math.abs(delta) < 0.0005) return "0";
    return decimal(delta, Math.abs(delta) < 0.1 ? 3 : 2, true);
  }

  sentence(delta) {
    const [base, rl] = this.names;
    if (Number.isNaN(delta)) return "No number: neither model gives this token a probability.";
    if (Math.abs(delta) < 0.005) return `As probable under ${rl} as under ${base}`;
    const factor = Math.exp(Math.abs(delta));
    if (!Number.isFinite(factor)) return `Only one of ${base} and ${rl} allows it`;
    const size = factor >= 100 ? grouped(Math.round(factor)) : factor.toFixed(factor >= 10 ? 0 : 2);
    return `${size}× ${delta > 0 ? "more" : "less"} probable under ${rl}`;
  }

  // [T, K] columns hold the best of every token first, then the second best, ...
  alternatives(model, words, ids, logp, i, length, own) {
    const count = length ? ids.length / length : 0;
    const rows = Array.from({ length: count }, (_, k) => {
      const word = ids[k * length + i];
      const p = Math.exp(logp[k * length + i]);
      const same = words.ids[word] === words.ids[own];
      const bar = h("i", { "aria-hidden": "true" });
      bar.style.width = `${100 * Math.min(1, p)}%`;
      return h(
        "li",
        same ? { class: "own", title: "the token of this response" } : {},
        bar,
        h("b", { dir: "auto" }, ...shown(words.texts[word])),
        h("span", {}, percent(p)),
      );
    });
    this.tops[model].replaceChildren(...rows);
  }

  // Read out after a pause, so that held-down arrows do not stutter.
  speak() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (this.spoken.textContent = this.sayable ?? ""), 200);
  }
}
