// The token lens of a report: reads the page's JSON and shows one prompt of one step. Text only ever becomes textContent,
// and colours are classes of page.css, so the content security policy needs no more than this script's hash.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.runs.length) return;
  const $ = (id) => document.getElementById(id);
  const [run, split, quantity, prompt, step] = ["run", "split", "quantity", "prompt", "step"].map($);
  const SEQUENTIAL = 7, DIVERGING = 9;
  let wanted = null; // key of the prompt that the reader chose

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  const short = (value) => (value == null ? "none" : String(Number(value.toPrecision(3))).replace("-", "−"));
  const signed = (value) => (value > 0 ? "+" : "") + short(value);
  const own = () => data.runs[run.value].splits[split.value];
  const record = () => own().steps[step.value];
  const scale = () => data.scales.find((one) => one.name === quantity.value);

  function fill(select, labels) {
    const kept = select.value;
    select.replaceChildren(...labels.map(([value, label]) => element("option", { value }, label)));
    if (labels.some(([value]) => String(value) === kept)) select.value = kept;
  }

  /** The class of a value's colour: q0 to q6 from 0 to the end of the scale, d0 to d8 from minus the end to plus. */
  function colour(value, { signed, end }) {
    if (value == null) return "none";
    if (signed) return "d" + (Math.round(Math.max(-1, Math.min(1, value / end)) * 4) + 4);
    return "q" + Math.min(SEQUENTIAL - 1, Math.floor((Math.max(0, value) / end) * SEQUENTIAL));
  }

  function drawLegend() {
    const { signed: two, end, title, unit } = scale();
    const bins = Array.from({ length: two ? DIVERGING : SEQUENTIAL }, (_, i) => i);
    const last = bins.length - 1;
    const items = bins.map((i) => {
      const value = two ? ((i - 4) / 4) * end : (i / SEQUENTIAL) * end;
      const sign = i === last && scale().name !== "probability" ? "≥ " : two && i === 0 ? "≤ " : "";
      return element("li", {}, element("span", { class: "swatch " + (two ? "d" : "q") + i }), sign + short(value));
    });
    $("legend").replaceChildren(element("li", { class: "name" }, title + (unit ? ", " + unit : "")), ...items);
  }

  const names = () => {
    const found = new Set();
    for (const one of own().steps)
      for (const p of one.prompts) for (const r of p.responses) Object.keys(r.chosen).forEach((name) => found.add(name));
    return [...found].filter((name) => name !== "dropped").sort();
  };

  function drawMarks(controls) {
    const marks = controls.map((name, i) => element("span", {}, element("span", { class: `token mark${i % 3}` }, "token"), ` chosen by ${name}`));
    if (own().steps.some((s) => s.prompts.some((p) => p.responses.some((r) => r.chosen.dropped))))
      marks.push(element("span", {}, element("span", { class: "token dropped" }, "token"), " left out of the loss"));
    $("marks").replaceChildren(...marks);
  }

  function describe(response, i) {
    const v = response.values, parts = [`token ${i + 1} of ${response.length}: “${response.pieces[i]}”`];
    if (v.entropy) parts.push(`entropy ${short(v.entropy[i])} nats`);
    if (v.probability) {
      const before = v.probability[i], change = v.change ? v.change[i] : null;
      parts.push(`probability ${short(before)}` + (change == null ? "" : ` → ${short(before + change)}`));
    }
    if (v.advantage) parts.push(v.advantage[i] == null ? "no advantage" : `advantage ${signed(v.advantage[i])}`);
    if (v.covariance && v.covariance[i] != null) parts.push(`covariance ${signed(v.covariance[i])} nats`);
    for (const [name, at] of Object.entries(response.chosen))
      if (at.includes(i)) parts.push(name === "dropped" ? "left out of the loss" : `chosen by ${name}`);
    return parts.join(" · ");
  }

  function drawResponse(response, number, controls) {
    const values = response.values[quantity.value] || [];
    const chosen = Object.fromEntries(Object.entries(response.chosen).map(([name, at]) => [name, new Set(at)]));
    const tokens = response.pieces.map((piece, i) => {
      const classes = ["token", colour(values[i], scale())];
      controls.forEach((name, c) => chosen[name] && chosen[name].has(i) && classes.push(`mark${c % 3}`));
      if (chosen.dropped && chosen.dropped.has(i)) classes.push("dropped");
      return element("span", { class: classes.join(" ") }, piece);
    });
    const cut = response.length - response.pieces.length;
    const facts = [`Response ${number + 1}`, `score ${short(response.score)}`, `${response.length} tokens`];
    if (!response.finished) facts.push("cut off at the length limit");
    const text = element("div", { class: "text", tabindex: 0, role: "group", dir: "ltr", "aria-label": `Tokens of response ${number + 1}` }, ...tokens);
    if (cut) text.append(element("span", { class: "cut" }, ` … ${cut} more tokens are not in the record`));
    let at = -1;
    const show = (i) => {
      if (tokens[at]) tokens[at].classList.remove("current");
      at = i;
      if (!tokens[at]) return;
      tokens[at].classList.add("current");
      tokens[at].scrollIntoView({ block: "nearest" });
      $("token").textContent = describe(response, at);
    };
    text.addEventListener("pointerover", (event) => tokens.includes(event.target) && show(tokens.indexOf(event.target)));
    text.addEventListener("click", (event) => tokens.includes(event.target) && show(tokens.indexOf(event.target)));
    text.addEventListener("blur", () => show(-1));
    text.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (to === undefined || !tokens.length) return;
      event.preventDefault();
      show(Math.max(0, Math.min(tokens.length - 1, to)));
    });
    return element("article", {}, element("h3", {}, facts.join(" · ")), text);
  }

  function drawHistory(shown) {
    const steps = own().steps.map((one) => one.step);
    $("history").replaceChildren(...shown.history.map(([at, right, sampled]) => {
      const label = `step ${at}: ${right} of ${sampled} right`;
      const height = Math.round((10 * right) / sampled);
      const button = element("button", { type: "button", title: label, "aria-label": label }, element("span", { class: `bar h${height}` }), element("span", { class: "count" }, `${right}/${sampled}`), element("span", { class: "at" }, String(at)));
      if (at === record().step) button.setAttribute("aria-current", "step");
      const there = own().steps.find((one) => one.step === at);
      button.disabled = !there.prompts.some((one) => one.key === shown.key); // counted there, but without a response
      button.addEventListener("click", () => {
        wanted = shown.key;
        step.value = steps.indexOf(at);
        draw();
        const now = $("history").querySelector('[aria-current="step"]');
        if (now) now.focus();
      });
      return element("li", {}, button);
    }));
  }

  function draw() {
    const steps = own().steps, prompts = record().prompts;
    $("shown").textContent = `${record().step} (record ${Number(step.value) + 1} of ${steps.length})`;
    step.setAttribute("aria-valuetext", `step ${record().step}`);
    const labels = prompts.map((one, i) => {
      const [, right, sampled] = one.history.find(([at]) => at === record().step) || [];
      const text = one.prompt.replace(/⏎?\s+/g, " ");
      return [i, (text.length > 60 ? text.slice(0, 60) + "…" : text) + (sampled ? ` (${right}/${sampled})` : "")];
    });
    fill(prompt, labels);
    prompt.value = Math.max(0, prompts.findIndex((one) => one.key === wanted));
    const shown = prompts[prompt.value], controls = names();
    if (wanted === null) wanted = shown.key; // the other steps and runs show the same one, where they have it
    $("task").replaceChildren(element("h3", {}, "Prompt"), element("p", { class: "text", dir: "ltr" }, shown.prompt),
      element("p", { class: "note" }, `answer: ${shown.answer} · ${shown.source}`));
    drawHistory(shown);
    drawLegend();
    drawMarks(controls);
    $("responses").replaceChildren(...shown.responses.map((one, i) => drawResponse(one, i, controls)));
  }

  function chooseSplit() {
    const present = new Set();
    for (const one of own().steps) for (const p of one.prompts) for (const r of p.responses) Object.keys(r.values).forEach((name) => present.add(name));
    fill(quantity, data.scales.filter((one) => present.has(one.name)).map((one) => [one.name, one.title]));
    step.max = own().steps.length - 1;
    step.value = step.max;
    draw();
  }

  function chooseRun() {
    fill(split, data.runs[run.value].splits.map((one, i) => [i, one.title]));
    chooseSplit();
  }

  fill(run, data.runs.map((one, i) => [i, one.label]));
  run.addEventListener("change", chooseRun);
  split.addEventListener("change", chooseSplit);
  quantity.addEventListener("change", draw);
  prompt.addEventListener("change", () => { wanted = record().prompts[prompt.value].key; draw(); });
  step.addEventListener("input", draw);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  chooseRun();
})();
