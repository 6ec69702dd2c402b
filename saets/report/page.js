"use strict";
// Everything is shown as text nodes: nothing that a model, a judge or a goal's name says becomes part of the page's own code.
(() => {
  const run = JSON.parse(document.getElementById("contents").textContent);
  const BATCH = 24; // texts shown at once
  const place = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const methods = new Map(run.methods.map((method) => [method.id, method]));
  const goals = run.goals.map((goal) => goal.id);
  const compared = run.methods.filter((method) => run.scores.some((row) => row.method === method.id));
  const best = new Map(run.scores.map((row) => [JSON.stringify([row.goal, row.method]), row]));
  const texts = rowsOf(run.texts);
  const scales = rowsOf(run.scales);
  const state = { goal: "", method: "", scale: "best", order: "", find: "" };
  const START = { ...state };
  let shown = BATCH;

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function styled(made, style) {
    Object.assign(made.style, style);
    return made;
  }

  /** The rows of a table that came as columns. */
  function rowsOf(columns) {
    const names = Object.keys(columns);
    const of = names.map((name) => {
      const column = columns[name];
      return Array.isArray(column) ? column : column.at.map((at) => column.of[at]);
    });
    return of[0].map((_, i) => Object.fromEntries(names.map((name, at) => [name, of[at][i]])));
  }

  const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const nameOf = (method) => methods.get(method)?.name ?? method;
  const percent = (value) => `${Math.max(0, Math.min(1, value)) * 100}%`;

  /** A colour of the charts as it is seen on a dark ground: greys turned round, dark colours lightened. */
  function seen(colour) {
    const found = dark.matches && /^#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})$/i.exec(colour);
    if (!found) return colour;
    const parts = found.slice(1).map((part) => parseInt(part, 16));
    const luminance = (0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]) / 255;
    if (Math.max(...parts) - Math.min(...parts) < 12) return hex(parts.map((part) => 32 + (255 - part) * 0.8));
    const lighter = Math.max(0, 0.48 - luminance) / (1 - luminance);
    return hex(parts.map((part) => part + (255 - part) * lighter));
  }

  const hex = (parts) => `#${parts.map((part) => Math.round(part).toString(16).padStart(2, "0")).join("")}`;
  const dot = (method) => styled(element("span", { class: "dot", "aria-hidden": "true" }), { background: seen(methods.get(method)?.colour ?? "#777777") });

  // ---- what is chosen, here and in the address

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    Object.assign(state, START);
    for (const name of Object.keys(state)) if (given.has(name)) state[name] = given.get(name);
    if (!goals.includes(state.goal)) state.goal = "";
    if (!compared.some((method) => method.id === state.method)) state.method = "";
    for (const name of ["scale", "order"]) {
      if (![...place(name).options].some((option) => option.value === state[name])) state[name] = START[name];
    }
  }

  function choose(changes) {
    Object.assign(state, changes);
    const said = new URLSearchParams(Object.entries(state).filter(([name, value]) => value !== START[name]));
    history.replaceState(null, "", `#${said}`);
    show();
    if ("goal" in changes || "method" in changes) {
      const about = [state.goal || "all goals", state.method ? nameOf(state.method) : "all methods"];
      place("status").textContent = `Showing ${about.join(", ")}`;
    }
  }

  const fits = (row) => (!state.goal || !row.goal || row.goal === state.goal)
    && (!state.method || !row.method || row.method === state.method || row.other === state.method);

  // ---- scores

  function showScores() {
    const most = Math.max(0.01, ...run.scores.flatMap((row) => [row.held_out_high, row.held_out, row.optimistic_max]));
    const head = element("tr", {}, element("th", { scope: "col" }, "goal"),
      ...compared.map((method) => element("th", { scope: "col" }, dot(method.id), method.name)));
    const rows = [...new Set(run.scores.map((row) => row.goal))].map((goal) => {
      const all = goal === run.all_goals && !goals.includes(goal);
      return element("tr", { class: all ? "all" : null }, element("th", { scope: "row" }, goal),
        ...compared.map((method) => element("td", {}, scoreCell(goal, all, method, most))));
    });
    place("matrix").replaceChildren(
      element("caption", { class: "hidden" }, "Held-out score of each goal and method; a button shows both everywhere"),
      element("thead", {}, head), element("tbody", {}, ...rows));
    place("behaviour").textContent = run.goals.find((goal) => goal.id === state.goal)?.behaviour
      ?? "Choose a goal or a method here or above; the whole page follows.";
  }

  function scoreCell(goal, all, method, most) {
    const row = best.get(JSON.stringify([goal, method.id]));
    if (!row) return element("span", { class: "cell" }, "–");
    const colour = seen(method.colour);
    const at = (value) => percent(value / most);
    const track = element("span", { class: "track", "aria-hidden": "true" });
    if (row.held_out_low !== null) {
      const span = { left: at(row.held_out_low), right: `calc(100% - ${at(row.held_out_high)})`, background: colour };
      track.append(styled(element("span", { class: "span" }), span));
    }
    if (row.optimistic_max !== null) track.append(styled(element("span", { class: "most" }), { left: at(row.optimistic_max) }));
    if (row.held_out !== null) track.append(styled(element("span", { class: "point" }), { left: at(row.held_out), background: colour }));
    const range = row.held_out_low === null ? (row.held_out === null ? "not held out" : "no interval") : `${number(row.held_out_low)} – ${number(row.held_out_high)}`;
    const failed = row.n_failed ? ` · ${row.n_failed.toLocaleString("en")} failed` : "";
    const badge = { winner: "best", tie: "tie" }[row.standing];
    const chosen = all ? state.goal === "" && state.method === method.id : state.goal === goal && state.method === method.id;
    const value = row.held_out ?? row.optimistic_max;
    const cell = element("button", {
      type: "button", class: "cell", "aria-pressed": String(chosen),
      "aria-label": `${goal}, ${method.name}: ${number(value)}${badge ? `, ${badge}` : ""}, ${range}, optimistic ${number(row.optimistic_max)}${failed}`,
    }, badge ? element("span", { class: `badge ${row.standing}` }, badge) : null,
      element("span", { class: "value" }, number(value)),
      element("span", { class: "range" }, range + (row.scale === null ? "" : ` · scale ${row.scale}`) + failed), track);
    const apart = (state.method && state.method !== method.id) || (state.goal && !all && state.goal !== goal);
    if (apart) cell.classList.add("dim");
    cell.addEventListener("click", () => {
      choose(chosen ? { goal: "", method: "" } : { goal: all ? "" : goal, method: method.id });
      const again = [...place("matrix").querySelectorAll("button")].find((one) => one.getAttribute("aria-label") === cell.getAttribute("aria-label"));
      again?.focus({ preventScroll: true });
    });
    return cell;
  }

  // ---- tables

  const isNumber = (cells) => cells.every((cell) => /^[–+−-]?[\d.,]*/.test(cell) && /^([–]|[+−-]?\d)/.test(cell));

  function table(header, rows, captioned) {
    const numeric = header.map((_, at) => rows.length > 0 && isNumber(rows.map((row) => row[at])));
    const cell = (tag, at, text) => element(tag, { class: numeric[at] ? "number" : null, scope: tag === "th" ? "col" : null }, text);
    return [element("caption", { class: "hidden" }, captioned),
      element("thead", {}, element("tr", {}, ...header.map((text, at) => cell("th", at, text)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((text, at) => cell("td", at, text)))))];
  }

  function showTables() {
    for (const where of document.querySelectorAll("[data-table]")) {
      const found = run.tables[where.dataset.table];
      where.hidden = !found;
      if (!found) continue;
      const rows = found.rows.filter(fits).map((row) => row.cells);
      const open = where.querySelector("details")?.open ?? false;
      const body = rows.length
        ? element("div", { class: "wide", role: "region", tabindex: "0", "aria-label": found.title }, element("table", {}, ...table(found.header, rows, found.title)))
        : element("p", { class: "empty" }, "Nothing of this goal and method.");
      const note = element("p", { class: "note" }, found.note);
      if (where.classList.contains("fold")) {
        where.replaceChildren(element("details", { open }, element("summary", {}, found.title), note, body));
      } else {
        where.replaceChildren(element("h3", {}, found.title), note, body);
      }
    }
    place("no-failures").hidden = Boolean(run.tables["failed-texts"] || run.tables["failed-vectors"]);
    for (const section of document.querySelectorAll("#beside, #judges, #fit")) {
      section.hidden = ![...section.querySelectorAll("[data-table], figure")].some((one) => !one.hidden);
    }
    showFigures();
  }

  function showFigures() {
    if (!place("figures").open) return;
    const within = (row, name) => (row[`${name}_low`] === null ? number(row[name]) : `${number(row[name])} [${number(row[`${name}_low`])}, ${number(row[`${name}_high`])}]`);
    const rows = scales.filter(fits).map((row) => [row.goal, nameOf(row.method), row.prompt, String(row.scale) + (row.chosen ? " (best)" : ""),
      within(row, "behaviour"), within(row, "coherence"), within(row, "product"), String(row.n), String(row.n_failed)]);
    place("scale-table").replaceChildren(...table(["goal", "method", "prompt", "scale", "behaviour", "coherence", "product", "texts", "failed"], rows, "Scores by scale"));
  }

  function showGauges() {
    const row = (name) => run.tables.fit?.rows.find((one) => one.cells[0].startsWith(name))?.cells[1];
    const r2 = parseFloat(row("R2 of held-out rows"));
    if (Number.isNaN(r2)) return;
    const ceiling = parseFloat(row("R2 that the"));
    const quartiles = row("R2 of features").split(" · ").map(parseFloat);
    const track = element("span", { class: "track", "aria-hidden": "true" }, styled(element("span", { class: "fill" }), { width: percent(r2) }));
    if (!Number.isNaN(ceiling)) track.append(styled(element("span", { class: "most" }), { left: percent(ceiling) }));
    const gauges = [element("div", { class: "gauge" }, element("h3", {}, "Effects predicted"), element("span", { class: "big" }, `R² ${number(r2)}`), track,
      element("p", {}, Number.isNaN(ceiling) ? "On vectors left out of the fit." : `On vectors left out of the fit; the measurement's noise allows ${number(ceiling)} (the tick).`))];
    if (quartiles.length === 3 && !quartiles.some(Number.isNaN)) {
      const [low, middle, high] = quartiles;
      gauges.push(element("div", { class: "gauge" }, element("h3", {}, "Feature by feature"), element("span", { class: "big" }, `median ${number(middle)}`),
        element("span", { class: "track", "aria-hidden": "true" }, styled(element("span", { class: "span" }), { left: percent(low), right: percent(1 - Math.min(1, high)) }),
          styled(element("span", { class: "most" }), { left: percent(middle) })),
        element("p", {}, `Half of the features lie between R² ${number(low)} and ${number(high)}.`)));
    }
    place("gauges").replaceChildren(...gauges);
  }

  // ---- texts

  function isAtChosenScale(text) {
    if (text.method === "unsteered") return true;
    const row = best.get(JSON.stringify([text.goal, text.method]));
    return row !== undefined && row.scale === text.scale;
  }

  const lower = texts.map((text) => `${text.prompt}\n${text.completion}\n${text.behaviour_reply ?? ""}\n${text.coherence_reply ?? ""}`.toLowerCase());

  function foundTexts() {
    const words = state.find.toLowerCase();
    const found = texts.filter((text, i) => (!state.goal || text.goal === state.goal)
      && (!state.method || text.method === state.method || (state.scale === "0" && text.method === "unsteered"))
      && (state.scale === "best" ? isAtChosenScale(text) : state.scale === "failed" ? text.product === null : !state.scale || text.scale === Number(state.scale))
      && (!words || lower[i].includes(words)));
    const sign = { best: -1, worst: 1 }[state.order];
    if (sign) return found.filter((text) => text.product !== null).sort((a, b) => sign * (a.product - b.product));
    if (state.order === "sample") {
      const key = (text) => [goals.indexOf(text.goal), text.prompt, text.sample];
      return found.sort((a, b) => key(a)[0] - key(b)[0] || (key(a)[1] < key(b)[1] ? -1 : key(a)[1] > key(b)[1] ? 1 : a.sample - b.sample));
    }
    return found;
  }

  function marked(text) {
    const parts = [];
    const words = state.find.toLowerCase();
    const low = text.toLowerCase();
    if (!words || low.length !== text.length) return [text];
    let from = 0;
    for (let at = low.indexOf(words); at >= 0; at = low.indexOf(words, from)) {
      parts.push(text.slice(from, at), element("mark", {}, text.slice(at, at + words.length)));
      from = at + words.length;
    }
    return [...parts, text.slice(from)];
  }

  function card(text) {
    const about = element("p", { class: "about" }, element("span", {}, dot(text.method), element("b", {}, nameOf(text.method))),
      element("span", {}, element("b", {}, text.goal)), element("span", {}, `scale ${text.scale}`), element("span", {}, `sample ${text.sample}`));
    const failed = text.product === null;
    const grades = element("dl", { class: "grades" }, ...["behaviour", "coherence", "product"].map((name) => element("div", {},
      element("dt", {}, name), element("dd", {}, number(text[name], 2)),
      failed ? null : element("span", { class: "track", "aria-hidden": "true" }, styled(element("span", { class: "fill" }), { width: percent(text[name]) })))));
    const said = ["behaviour", "coherence"].filter((name) => text[`${name}_reply`]);
    const replies = said.length ? element("details", { open: Boolean(failed || state.find) }, element("summary", {}, failed ? "not graded" : "the judge's words"),
      ...said.map((name) => element("p", {}, `${name}: `, ...marked(text[`${name}_reply`])))) : null;
    return element("li", { class: failed ? "text failed" : "text" }, about,
      element("p", { class: "words" }, element("span", { class: "prompt" }, ...marked(text.prompt)), ...marked(text.completion)), grades, replies);
  }

  function showTexts() {
    const found = foundTexts();
    place("texts").replaceChildren(...found.slice(0, shown).map(card));
    const all = texts.length < run.texts_in_all ? `; the page holds ${texts.length.toLocaleString("en")} of ${run.texts_in_all.toLocaleString("en")}, the first samples of each scale` : "";
    place("count").textContent = found.length
      ? `${Math.min(shown, found.length).toLocaleString("en")} of ${found.length.toLocaleString("en")} texts${all}`
      : `No text fits this choice${all}`;
    place("more").hidden = found.length <= shown;
  }

  // ---- charts

  const figures = [...document.querySelectorAll("[data-chart]")].map((figure) => ({ figure, drawn: null, near: false, box: figure.appendChild(element("div", { class: "chart" })) }));

  function leading() {
    const scored = compared.map((method) => {
      const rows = run.scores.filter((row) => row.method === method.id && row.goal !== run.all_goals && row.held_out !== null);
      return [rows.reduce((sum, row) => sum + row.held_out, 0) / (rows.length || 1), method.id];
    });
    return scored.sort((a, b) => b[0] - a[0])[0]?.[1] ?? "";
  }

  function specification(name, room) {
    const found = run.charts[name === "criteria" ? `criteria-${state.method || leading()}` : name];
    if (!found) return null;
    const chart = structuredClone(found);
    const places = new Set();
    for (const [key, rows] of Object.entries(chart.datasets ?? {})) {
      chart.datasets[key] = rows.filter((row) => !("panel" in row) || !state.goal || run.panels[row.panel] === state.goal);
      chart.datasets[key].forEach((row) => "panel" in row && places.add(row.panel));
    }
    if (chart.facet) {
      if (!places.size) return null;
      chart.facet.sort = chart.facet.sort.filter((title) => places.has(title));
      fitPanels(chart, places.size, room);
      emphasise(chart);
    }
    return recoloured(chart);
  }

  /** As many panels a row as there is room for, in pixels. */
  function fitPanels(chart, count, room) {
    const around = 58; // what axes and gaps take beside a panel
    chart.columns = Math.max(1, Math.min(count, chart.columns ?? 3, Math.floor(room / (240 + around))));
    const width = Math.min(480, room / chart.columns - around);
    chart.spec.height *= width / chart.spec.width;
    chart.spec.width = width;
    for (const { encoding = {} } of chart.spec.layer) {
      for (const one of [encoding.color, encoding.shape].filter((channel) => channel?.legend)) {
        one.legend.columns = Math.max(1, Math.min(one.legend.columns ?? 9, Math.floor(room / 150)));
      }
    }
  }

  /** The chosen method before the others, which stay to compare with. */
  function emphasise(chart) {
    if (!state.method) return;
    for (const layer of chart.spec.layer.filter((one) => !one.data && "color" in (one.encoding ?? {}) && "field" in one.encoding.color)) {
      const mark = typeof layer.mark === "string" ? { type: layer.mark } : layer.mark;
      const chosen = `!isValid(datum.method) || datum.method === ${JSON.stringify(state.method)}`;
      layer.encoding.opacity = { condition: { test: chosen, value: mark.opacity ?? 1 }, value: mark.type === "area" ? 0 : 0.18 };
    }
  }

  function recoloured(value) {
    if (typeof value === "string") return value === "white" && dark.matches ? "#1e1e21" : seen(value);
    if (Array.isArray(value)) return value.map(recoloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, name === "datasets" ? one : recoloured(one)]));
    return value;
  }

  async function draw(one) {
    const name = one.figure.dataset.chart;
    const room = one.figure.clientWidth - 46;
    const key = JSON.stringify([state.goal, state.method, dark.matches, room]);
    if (one.drawn === key) return;
    const chart = specification(name, room);
    one.figure.hidden = !chart;
    if (!chart) return;
    one.drawn = key;
    const ink = seen("#1d1d1f"), soft = seen("#4a4a52");
    const config = { background: "transparent", axis: { labelColor: soft, titleColor: ink, domainColor: seen("#888888"), tickColor: seen("#888888") },
      legend: { labelColor: ink, titleColor: ink }, header: { labelColor: ink, titleColor: ink }, title: { color: ink } };
    delete chart.config.background;
    const about = `${state.goal || "all goals"}, ${state.method ? nameOf(state.method) : name === "criteria" ? nameOf(leading()) : "all methods"}`;
    chart.description = `${one.figure.querySelector("h3").textContent}: ${about}. The figures are in the table below the charts.`;
    const inner = element("div");
    const box = element("div", { class: "chart" }, inner);
    // Vega's expressions are interpreted: the page's policy lets no text become code.
    const view = await vegaEmbed(inner, chart, { mode: "vega-lite", renderer: "svg", ast: true, config, tooltip: { theme: dark.matches ? "dark" : "light" },
      actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: `${run.name}-${name}` });
    if (one.drawn !== key) return view.finalize();
    one.view?.finalize();
    one.view = view;
    one.box.replaceWith(box);
    one.box = box;
  }

  function drawCharts() {
    const method = state.method || leading();
    place("criteria-note").textContent = `Behaviour, coherence and their product for ${nameOf(method)}${state.method ? "" : ", the method with the highest scores; choose another above"}.`;
    const single = Object.values(run.panels).filter((goal) => !state.goal || goal === state.goal).length === 1;
    place("charts").classList.toggle("pairs", single);
    for (const one of figures) {
      const there = one.figure.dataset.chart === "criteria" ? run.charts[`criteria-${method}`] : run.charts[one.figure.dataset.chart];
      one.figure.hidden = !there;
    }
    return Promise.all(figures.filter((one) => one.near).map(draw));
  }

  // ---- all of it

  function show() {
    for (const name of ["goal", "method", "scale", "order"]) place(name).value = state[name];
    if (place("search").value !== state.find) place("search").value = state.find;
    shown = BATCH;
    showScores();
    const drawn = drawCharts();
    showTexts();
    showTables();
    return drawn;
  }

  function fill() {
    place("name").textContent = run.name;
    place("description").textContent = run.description;
    place("facts").replaceChildren(...run.facts.map(([what, said]) => element("div", {}, element("dt", {}, what), element("dd", {}, said))));
    const option = (value, text) => element("option", { value }, text);
    place("goal").replaceChildren(option("", "all goals"), ...goals.map((goal) => option(goal, goal)));
    place("method").replaceChildren(option("", "all methods"), ...compared.map((method) => option(method.id, method.name)));
    const steps = [...new Set(texts.map((text) => text.scale))].sort((a, b) => a - b);
    place("scale").replaceChildren(option("best", "each method's best"), option("", "every scale"),
      ...steps.map((scale) => option(String(scale), scale === 0 ? "0, unsteered" : String(scale))),
      ...(texts.some((text) => text.product === null) ? [option("failed", "those without a score")] : []));
    place("settings").textContent = run.settings;
    place("provenance").replaceChildren(...table(["entry", "value"], run.provenance, "Manifest"));
    showGauges();
  }

  function listen() {
    for (const name of ["goal", "method", "scale", "order"]) place(name).addEventListener("change", (event) => choose({ [name]: event.target.value }));
    for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
    place("search").addEventListener("input", (event) => choose({ find: event.target.value }));
    place("reset").addEventListener("click", () => choose({ ...START }));
    place("more").addEventListener("click", () => {
      const from = shown;
      shown += BATCH;
      showTexts();
      const next = place("texts").children[from];
      next?.setAttribute("tabindex", "-1");
      next?.focus({ preventScroll: true });
    });
    place("figures").addEventListener("toggle", showFigures);
    window.addEventListener("hashchange", () => { readAddress(); show(); });
    window.addEventListener("resize", () => requestAnimationFrame(drawCharts));
    dark.addEventListener("change", () => show());
    // The address holds what is chosen, so links within the page leave it as it is.
    document.addEventListener("click", (event) => {
      const link = event.target.closest("a[href^='#']");
      if (!link) return;
      event.preventDefault();
      const target = place(link.getAttribute("href").slice(1));
      target?.scrollIntoView();
      target?.focus({ preventScroll: true });
    });
    const watching = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const one = figures.find((candidate) => candidate.figure === entry.target);
        if (entry.isIntersecting && !one.near) { one.near = true; draw(one); }
      }
    }, { rootMargin: "300px" });
    figures.forEach((one) => watching.observe(one.figure));
    window.addEventListener("beforeprint", () => { figures.forEach((one) => { one.near = true; }); drawCharts(); });
  }

  fill();
  readAddress();
  show();
  listen();
  const nav = [...document.querySelectorAll("main > section")].filter((section) => !section.hidden);
  place("nav").replaceChildren(...nav.map((section) => element("a", { href: `#${section.id}` }, section.dataset.short ?? section.querySelector("h2").textContent)));
  document.documentElement.dataset.ready = Math.round(performance.now());
  // What has not come into view is drawn when there is time, so that it is there for a printer.
  const later = () => { figures.forEach((one) => { one.near = true; }); drawCharts().then(() => { document.documentElement.dataset.drawn = Math.round(performance.now()); }); };
  window.requestIdleCallback ? requestIdleCallback(later, { timeout: 3000 }) : setTimeout(later, 500);
})();
