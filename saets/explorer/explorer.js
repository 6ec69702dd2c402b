"use strict";
// Everything that comes from models, files or people is put into the page as text, never as HTML.
(() => {
  const about = JSON.parse(document.getElementById("about").textContent);
  const byId = (id) => document.getElementById(id);
  const SIGNS = { all: "both ways", up: "raised", down: "lowered" };
  const SHOWN = 30;
  const LISTED = 200;

  // ---- data: unpacked when first asked for -------------------------------------------------------------------------------

  const unpacked = new Map();

  function bytes(name) {
    const letters = byId(`data-${name}`).textContent;
    const packed = Uint8Array.fromBase64 ? Uint8Array.fromBase64(letters) : Uint8Array.from(atob(letters), (one) => one.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  function once(name, read) {
    if (!about.blobs.includes(name)) return Promise.resolve(null);
    if (!unpacked.has(name)) unpacked.set(name, bytes(name).then(read));
    return unpacked.get(name);
  }

  const json = (name) => once(name, (buffer) => JSON.parse(new TextDecoder().decode(buffer)));
  const halves = (name) => once(name, (buffer) => new Uint16Array(buffer));
  const floats = (name) => once(name, (buffer) => new Float32Array(buffer));

  function half(bits) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const sign = bits & 32768 ? -1 : 1;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
  }

  async function one(name, at) {
    const values = await halves(name);
    return values ? half(values[at]) : NaN;
  }

  // Entries of one row of a list, strongest first; null where the page has no such list.
  async function entries(name, row) {
    const shape = about.lists[name];
    if (!shape) return null;
    if (row < 0 || row >= shape.rows) return [];
    const kind = shape.index === "u16" ? Uint16Array : Uint32Array;
    const [index, value, error] = await Promise.all([
      once(`${name}.index`, (buffer) => new kind(buffer)),
      halves(`${name}.value`),
      shape.errors ? halves(`${name}.error`) : null,
    ]);
    const found = [];
    for (let at = row * shape.width; at < (row + 1) * shape.width; at++) {
      const number = half(value[at]);
      if (!Number.isNaN(number)) found.push({ index: index[at], value: number, error: error ? half(error[at]) : NaN });
    }
    return found;
  }

  const texts = {};
  let vectors;
  const owned = new Map(); // features to the number of their decoder row
  const numbers = new Map(); // ids to numbers of vectors
  const places = []; // of vectors that are no decoder row, their place in lists of those alone

  async function load() {
    [vectors, texts.labels, texts.contexts, texts.tokens, texts.density] = await Promise.all([
      json("vectors"), json("labels"), json("contexts"), json("tokens"), floats("density"),
    ]);
    let others = 0;
    vectors.id.forEach((id, number) => {
      numbers.set(id, number);
      if (vectors.feature[number] >= 0) owned.set(vectors.feature[number], number);
      places.push(vectors.feature[number] >= 0 ? -1 : others++);
    });
  }

  const kindOf = (column, number) => vectors[column].kinds[vectors[column].of[number]];

  // ---- words -------------------------------------------------------------------------------------------------------------

  const plain = (text) => text.replace(/\s+/g, " ");

  function labelOf(feature) {
    return (texts.labels && texts.labels[feature]) || "";
  }

  // The tokens on which a feature fires most, each once.
  function firingTokens(feature) {
    const contexts = (texts.contexts && texts.contexts[feature]) || [];
    return [...new Set(contexts.map((context) => plain(context[2]).trim()).filter(Boolean))];
  }

  // A feature in a few words: its label, or the tokens on which it fires most.
  function aboutFeature(feature, length = 3) {
    const words = element("span", "about");
    const label = labelOf(feature);
    if (label) words.textContent = label;
    else words.textContent = firingTokens(feature).slice(0, length).join(" · ");
    words.title = words.textContent;
    return words;
  }

  // A context with the token marked; white space before the token stays outside the mark.
  function marked([, before, token, after]) {
    const line = (text) => text.replace(/\n+/g, " ⏎ ");
    const text = element("span", "context");
    const space = token.trim() ? token.slice(0, token.length - token.trimStart().length) : "";
    text.append(line(before + space), element("b", "", token.slice(space.length).replace(/\n/g, "⏎")), line(after));
    return text;
  }

  function namesOf(number) {
    const names = vectors.names[number] || [];
    return names.map(([goal, method]) => `${goal} · ${about.methods[method] || method}`);
  }

  function titleOf(number) {
    const names = namesOf(number);
    if (names.length) return names.join(", ");
    const index = vectors.index[number];
    return `${kindOf("source", number) || "vector"}${index === null ? "" : ` ${index}`}`;
  }

  const signed = (value) => (value < 0 ? "−" : "+") + magnitude(Math.abs(value));

  function magnitude(value) {
    if (value >= 100) return value.toFixed(0);
    if (value >= 10) return value.toFixed(1);
    if (value >= 0.1 || value === 0) return value.toFixed(2);
    return value.toPrecision(2).replace(/e-0?/, "e−");
  }

  const whole = (number) => number.toLocaleString("en-GB");

  // ---- elements ----------------------------------------------------------------------------------------------------------

  function element(name, kind = "", text = "") {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    if (text) made.textContent = text;
    return made;
  }

  function link(address, text = "") {
    const made = element("a", "", text);
    made.href = address;
    return made;
  }

  let numbered = 0;

  function card(title, what, ...content) {
    const made = element("section", "card");
    const heading = element("h2", "", title);
    heading.id = `h${++numbered}`;
    made.setAttribute("aria-labelledby", heading.id);
    made.append(heading);
    if (what) made.append(element("p", "what", what));
    made.append(...content);
    return made;
  }

  function facts(pairs) {
    const made = element("dl", "facts");
    for (const [name, value, more] of pairs) {
      const pair = element("div");
      const shown = element("dd");
      shown.append(value);
      if (more) shown.append(element("small", "", more));
      pair.append(element("dt", "", name), shown);
      made.append(pair);
    }
    return made;
  }

  // A bar from zero, with its standard error and what was predicted for the same feature; the figures stand beside it.
  function bar(value, error, predicted, low, high) {
    const made = element("span", "bar");
    made.setAttribute("aria-hidden", "true");
    const place = (number) => (100 * (Math.min(Math.max(number, low), high) - low)) / (high - low || 1);
    const span = (kind, from, to) => {
      const part = element("i", kind);
      part.style.left = `${Math.min(place(from), place(to))}%`;
      part.style.width = `${Math.abs(place(to) - place(from))}%`;
      made.append(part);
    };
    made.style.setProperty("--zero", `${place(0)}%`);
    span(value < 0 ? "down" : "up", 0, value);
    if (error > 0) span("whisker", value - error, value + error);
    if (predicted !== undefined) {
      const tick = element("i", "tick");
      tick.style.left = `calc(${place(predicted)}% - 1px)`;
      made.append(tick);
    }
    return made;
  }

  // `target` makes of an entry's index its link and words; `how` says whether values are effects or cosines.
  function list(found, target, { predicted, cosine = false, self } = {}) {
    if (!found.length) return element("p", "none", "Nothing here goes this way.");
    const ends = found.flatMap(({ value, error }) => (error > 0 ? [value - error, value + error] : [value]));
    const low = Math.min(0, ...ends);
    const high = Math.max(0, ...ends);
    const made = element("ol", found.some(({ error }) => error > 0) ? "list sure" : "list");
    for (const { index, value, error } of found) {
      const row = element("li", index === self ? "self" : "");
      const figure = element("span", "value", cosine ? value.toFixed(2).replace("-", "−") : signed(value));
      if (error > 0) figure.append(element("small", "", ` ± ${magnitude(error)}`));
      const expected = predicted ? predicted.get(index) : undefined;
      if (expected !== undefined) figure.title = `predicted ${signed(expected)}`;
      row.append(target(index), bar(value, error, expected, low, high), figure);
      made.append(row);
    }
    return made;
  }

  function toFeature(feature) {
    const made = link(address({ feature }));
    made.append(element("span", "id", String(feature)), aboutFeature(feature));
    return made;
  }

  function toVector(number) {
    const feature = vectors.feature[number];
    if (feature >= 0) return toFeature(feature);
    const made = link(address({ vector: vectors.id[number] }));
    made.append(element("span", "id", titleOf(number)));
    return made;
  }

  // ---- where we are: all of it is in the address -------------------------------------------------------------------------

  function state() {
    const given = new URLSearchParams(location.hash.slice(1));
    const sign = given.get("sign") in SIGNS ? given.get("sign") : "all";
    return { feature: given.get("feature"), vector: given.get("vector"), sign, query: given.get("find") || "" };
  }

  function address({ feature, vector, sign = state().sign, query = "" }) {
    const made = new URLSearchParams();
    if (feature !== undefined && feature !== null) made.set("feature", feature);
    if (vector) made.set("vector", vector);
    if (sign !== "all") made.set("sign", sign);
    if (query) made.set("find", query);
    return `#${made}`;
  }

  let drawn = 0;

  async function show() {
    const turn = ++drawn;
    const now = state();
    let view;
    if (now.feature !== null) {
      const feature = Number(now.feature);
      const there = /^\d+$/.test(now.feature) && feature < about.features;
      view = there ? await featureView(feature, now.sign) : nothingView(`There is no feature ${now.feature}; the SAE has 0 to ${about.features - 1}.`);
    } else if (now.vector) {
      const number = numbers.get(now.vector);
      if (number === undefined) view = nothingView(`There is no vector ${now.vector} in this page.`);
      else if (vectors.feature[number] >= 0) view = await featureView(vectors.feature[number], now.sign);
      else view = await vectorView(number, now.sign);
    } else if (now.query.trim()) {
      view = resultsView(now.query);
    } else {
      view = await homeView();
    }
    if (turn !== drawn) return;
    document.title = `${view.title} · ${about.title} · effects`;
    byId("main").replaceChildren(...view.content);
    if (byId("query").value !== now.query && document.activeElement !== byId("query")) byId("query").value = now.query;
    document.body.dataset.shown = location.hash;
  }

  function nothingView(text) {
    return { title: "Not found", content: [element("h1", "", "Not found"), element("p", "lead", text)] };
  }

  function filter(sign) {
    const made = element("fieldset", "filter");
    made.append(element("legend", "", "Effects shown:"));
    for (const [name, text] of Object.entries(SIGNS)) {
      const label = element("label");
      const choice = element("input");
      choice.type = "radio";
      choice.name = "sign";
      choice.value = name;
      choice.checked = name === sign;
      choice.addEventListener("change", async () => {
        history.pushState({ seen: true }, "", address({ ...state(), sign: name }));
        await show();
        const again = document.querySelector(`input[name="sign"][value="${name}"]`);
        if (again) again.focus();
      });
      label.append(choice, text);
      made.append(label);
    }
    const key = element("span", "key");
    const kinds = [["up", "raised"], ["down", "lowered"]];
    if (about.counts["not measured"] !== vectors.id.length) kinds.push(["whisker", "one standard error"]);
    if (about.fitted && vectors.measured) kinds.push(["tick", "predicted"]);
    for (const [kind, text] of kinds) {
      const part = element("span");
      part.append(element("i", kind), text);
      key.append(part);
    }
    made.append(key);
    return made;
  }

  const passing = (found, sign) => found.filter(({ value }) => sign === "all" || value > 0 === (sign === "up"));

  // ---- what lists are ----------------------------------------------------------------------------------------------------

  const UNITS = "difference in activation, mean over positions";

  // How many entries are shown, and of how many.
  function kept(found, sign, of) {
    const largest = `the ${whole(found.length)} largest of ${whole(of)}`;
    return sign === "all" ? largest : `of ${largest}, those ${SIGNS[sign]}`;
  }

  const ORIGINS = {
    "measured here": "Measured here",
    published: "Published by the method's authors",
    shipped: "Shipped",
    "shipped as sums": "Shipped, the strongest alone",
  };
  const origin = (number) => ORIGINS[kindOf("where", number)];

  function facesOf(number) {
    const outcome = kindOf("calibration", number);
    const scale = vectors.scale[number];
    const pairs = [];
    if (scale !== null) {
      const how = { ok: "calibrated", capped: "capped: the grid ended first", fixed: "fixed" }[outcome] || outcome;
      pairs.push(["Scale", magnitude(scale), how]);
    }
    const [loss, before] = [vectors.loss[number], vectors.unsteered_loss[number]];
    if (loss !== null && before !== null) pairs.push(["Loss at this scale", loss.toFixed(2), `unsteered ${before.toFixed(2)}`]);
    if (vectors.standard_error[number] !== null) pairs.push(["Standard error", magnitude(vectors.standard_error[number]), "RMS over features"]);
    if (vectors.n_rollouts[number]) pairs.push(["Rollouts", whole(vectors.n_rollouts[number])]);
    return pairs;
  }

  async function effectsCard(title, number, predicted, sign) {
    const found = await entries("effects", number);
    if (!found || !found.length) return null;
    const error = vectors.standard_error[number];
    const withErrors = found.map((entry) => (Number.isNaN(entry.error) && error !== null ? { ...entry, error } : entry));
    const ticks = new Map((predicted || []).map(({ index, value }) => [index, value]));
    const what = `${origin(number)} · ${UNITS} · ${kept(found, sign, about.features)}`;
    return card(title, what, list(passing(withErrors, sign), toFeature, { predicted: ticks, self: vectors.feature[number] }));
  }

  function predictedCard(title, what, found, sign, self) {
    if (!found || !found.length) return null;
    const words = `Predicted${what} · ${UNITS} · ${kept(found, sign, about.features)}`;
    return card(title, words, list(passing(found, sign), toFeature, { self }));
  }

  function predictor() {
    const { here, published } = about.fitted;
    if (here) return `a fit to ${here}`;
    return published ? "the published approximator" : "the run's approximator";
  }

  function neighboursCard(title, what, found, target) {
    if (!found) return null;
    if (!found.length) return card(title, what, element("p", "none", "None: it does not move or has no decoder row."));
    return card(title, `${what} · the ${found.length} nearest`, list(found, target, { cosine: true }));
  }

  const alikeWords = () =>
    `Cosine of measured effects, less the mean effect, over the ${whole(about.compared)} features that vary most (${(100 * about.variance_share).toFixed(0)}% of the variance)`;

  // ---- one feature -------------------------------------------------------------------------------------------------------

  async function featureView(feature, sign) {
    const number = owned.has(feature) ? owned.get(feature) : -1;
    const [predicted, targeted, causes, decoder, alike, expected] = await Promise.all([
      entries("predicted", feature), entries("targeted", feature), entries("causes", feature), entries("decoder_alike", feature),
      entries("effects_alike", number), entries("predicted_alike", feature),
    ]);
    const [own, ownPredicted, ownTargeted, r2] = await Promise.all(
      ["on_itself", "predicted_on_itself", "targeted_on_itself", "r2"].map((name) => one(name, feature)),
    );
    const label = labelOf(feature);
    const heading = element("h1", "", `Feature ${feature}`);
    if (label) heading.append(element("span", "of", label));
    const pairs = [];
    if (texts.density) pairs.push(["Density", share(texts.density[feature]), "of tokens fire it"]);
    if (!Number.isNaN(own)) pairs.push(["Effect on itself", signed(own), "its decoder row, measured"]);
    if (!Number.isNaN(ownPredicted)) pairs.push(["Predicted on itself", signed(ownPredicted), "its decoder row"]);
    if (!Number.isNaN(ownTargeted)) pairs.push(["Predicted on itself", signed(ownTargeted), "SAE-TS for it"]);
    if (number >= 0) pairs.push(...facesOf(number));
    if (!Number.isNaN(r2)) pairs.push(["Predicted with R²", r2.toFixed(2), "on held-out vectors"]);
    if (about.neuronpedia) {
      const page = link(`${about.neuronpedia}${feature}`, "Neuronpedia");
      page.rel = "noreferrer";
      pairs.push(["Elsewhere", page, "leaves this page"]);
    }
    const names = number >= 0 ? namesOf(number) : [];
    if (names.length) pairs.push(["Also", names.join(", ")]);

    const none = (title, reason) => card(title, "", element("p", "none", reason));
    const measured = number >= 0 ? await effectsCard("What it does", number, predicted, sign) : null;
    const bias = about.bias_weight === 1 ? "" : ` (bias weight ${about.bias_weight})`;
    const compared = number >= 0 && about.lists.effects_alike && number < about.lists.effects_alike.rows;
    const grid = columns(
      [
        measured || none("What it does", vectors.measured ? "Its decoder row was not measured." : missing("measured effects")),
        predictedCard("What it should do", ", its decoder row", predicted, sign, feature),
        about.fitted ? null : none("What it should do", missing("predictions")),
      ],
      [
        causesCard(causes, sign),
        predictedCard("What targeting it should do", `, the SAE-TS vector for it alone${bias}`, targeted, sign, feature),
      ],
      [
        compared ? neighboursCard("Measured effects alike", alikeWords(), alike, toVector) : null,
        neighboursCard("Predicted effects alike", "Cosine of decoder rows' predicted effects, without what every vector does", expected, toFeature),
        neighboursCard("Decoder rows alike", "Cosine of decoder rows", decoder, toFeature),
        about.lists.decoder_alike ? null : none("Decoder rows alike", missing("decoder")),
      ],
    );
    return { title: `Feature ${feature}`, content: [steps(feature), heading, facts(pairs), firing(feature), filter(sign), grid] };
  }

  // Cards in columns, one below the other; those that are not there leave no gap.
  function columns(...groups) {
    const grid = element("div", "grid");
    for (const group of groups) {
      const column = element("div", "column");
      column.append(...group.filter(Boolean));
      if (column.children.length) grid.append(column);
    }
    return grid;
  }

  function share(density) {
    return density ? `${magnitude(100 * density)}%` : "0";
  }

  const missing = (name) => `Not in this page: ${about.missing[name] || "nothing is known of it"}.`.replace("..", ".");

  function causesCard(found, sign) {
    if (!found) return null;
    const some = vectors.where.kinds.includes("shipped as sums");
    const of = some
      ? "all measured decoder rows, and the vectors whose effects are whole"
      : `${whole(vectors.measured)} measured vectors`;
    const errors = found.map((entry) => (Number.isNaN(entry.error) ? { ...entry, error: vectors.standard_error[entry.index] ?? NaN } : entry));
    const shown = sign === "all" ? "" : `, those ${SIGNS[sign]}`;
    const words = `Measured · ${UNITS} · the ${whole(found.length)} largest over ${of}${shown}`;
    return card("What causes it", words, list(passing(errors, sign), toVector));
  }

  function steps(feature) {
    const made = element("p", "path");
    if (feature > 0) made.append(link(address({ feature: feature - 1 }), `← ${feature - 1}`));
    if (feature + 1 < about.features) made.append(link(address({ feature: feature + 1 }), `${feature + 1} →`));
    return made;
  }

  function firing(feature) {
    if (!texts.contexts) {
      return card("What it fires on", "", element("p", "none", missing("cards")));
    }
    const contexts = element("ol", "contexts");
    for (const context of texts.contexts[feature]) {
      const row = element("li");
      row.append(element("span", "how", context[0].toFixed(1)), marked(context));
      contexts.append(row);
    }
    const tokens = element("ul", "tokens");
    for (const token of texts.tokens[feature]) tokens.append(element("li", "", token.replace(/\n/g, "⏎")));
    const left = element("div");
    const right = element("div");
    left.append(element("h2", "", "What it fires on"), element("p", "what", "Its largest activations, each in another text."));
    left.append(contexts.children.length ? contexts : element("p", "none", "It fired nowhere in the text that was read."));
    right.append(element("h2", "", "Top tokens"), element("p", "what", "Whose logits its decoder row raises most."), tokens);
    const made = element("section", "card wide two");
    made.setAttribute("aria-label", "What it fires on, and its top tokens");
    made.append(left, right);
    return made;
  }

  // ---- one vector --------------------------------------------------------------------------------------------------------

  async function vectorView(number, sign) {
    const [predicted, nearest, alike] = await Promise.all([
      entries("vector_predicted", places[number]), entries("nearest", places[number]), entries("effects_alike", number),
    ]);
    const names = namesOf(number);
    const heading = element("h1", "", names.length ? names.join(", ") : `Vector ${titleOf(number)}`);
    const lead = element("p", "lead", `Vector ${vectors.id[number]}, ${origin(number) ? `from the source “${kindOf("source", number)}”` : "made by this run, its effects not measured"}.`);
    const measured = await effectsCard("What it does", number, predicted, sign);
    const grid = columns(
      [measured || card("What it does", "", element("p", "none", "Its effects were not measured."))],
      [predictedCard("What it should do", "", predicted, sign)],
      [
        alike && alike.length ? neighboursCard("Measured effects alike", alikeWords(), alike, toVector) : null,
        neighboursCard("Decoder rows like it", "Cosine with decoder rows", nearest, toFeature),
      ],
    );
    return { title: heading.textContent, content: [heading, lead, facts(facesOf(number)), filter(sign), grid] };
  }

  // ---- the start ---------------------------------------------------------------------------------------------------------

  async function homeView() {
    const heading = element("h1", "", `Effects of vectors on features: ${about.title}`);
    const lead = element("p", "lead", "Look up a feature of the sparse autoencoder, or a vector: what it does to all features when the model is steered with it, what it is predicted to do, which vectors cause a feature, and what is like it. Press / to search, arrows and Enter to choose.");
    const again = element("button", "", "Any feature");
    again.type = "button";
    again.addEventListener("click", () => {
      location.hash = address({ feature: Math.floor(Math.random() * about.features) });
    });
    const own = await halves("on_itself");
    const moved = Array.from(own, (bits, index) => ({ index, value: half(bits), error: NaN })).filter(({ value }) => !Number.isNaN(value));
    const top = moved.sort((a, b) => b.value - a.value).slice(0, about.top);
    const words = `The ${top.length} largest of ${whole(moved.length)} measured effects of a decoder row on its own feature.`;
    const line = element("p", "lead");
    line.append(again);
    const start = columns(
      [about.goals.length ? goalsCard() : null, vectorsCard(), contents()],
      [top.length ? card("Rows that raise their own feature most", words, list(top, toFeature)) : null],
    );
    return { title: "Start", content: [heading, lead, line, start] };
  }

  function vectorsCard() {
    const numbers = Object.keys(vectors.names).map(Number);
    const rows = numbers.map((number) => {
      const made = toVector(number);
      if (vectors.feature[number] >= 0) made.prepend(element("span", "id", titleOf(number)));
      return made;
    });
    return numbers.length ? card("Vectors of this run", "Made for its goals, by its methods.", linkList(rows)) : null;
  }

  function linkList(links) {
    const made = element("ul", "list bare");
    for (const one of links) {
      const row = element("li");
      row.append(one);
      made.append(row);
    }
    return made;
  }

  function goalsCard() {
    const made = card("Goals", "Features that the experiment targets.");
    for (const goal of about.goals) {
      const part = element("div", "goal");
      part.append(element("h3", "", goal.id));
      part.append(linkList(goal.features.map(([feature]) => toFeature(feature))));
      made.append(part);
    }
    return made;
  }

  // What is in the page, what was kept of it, and what is not there.
  function contents() {
    const list = element("dl", "parts");
    const add = (name, text) => list.append(element("dt", "", name), element("dd", "", text));
    const number = (where) => about.counts[where] || 0;
    add("Features", `${whole(about.features)}, of the SAE: ${about.sae}`);
    const parts = [["measured here", "measured here"], ["published", "published"], ["shipped", "shipped with the preset"]]
      .filter(([where]) => number(where)).map(([where, words]) => `${whole(number(where))} ${words}`);
    if (number("shipped as sums")) parts.push(`${whole(number("shipped as sums"))} decoder rows that ship as sums, of which the strongest causes and effects are kept`);
    if (number("not measured")) parts.push(`${whole(number("not measured"))} of the run's own, not measured`);
    add("Vectors", parts.join("; ") || "none");
    if (about.unseen) add("Left out", `${whole(about.unseen)} other vectors that ship as sums alone`);
    if (about.fitted) add("Predictions", `by ${predictor()}${about.fitted.r2 ? `, R² ${about.fitted.r2.toFixed(2)} on held-out vectors` : ""}`);
    if (texts.contexts) add("Cards", "density, contexts and top tokens of every feature");
    if (about.labels) add("Labels", `of ${whole(about.labels)} features`);
    add("Kept", `of every list the ${about.top} entries largest in size; effects in half precision; cosines to 0.01`);
    if (vectors.measured) {
      const each = Object.values(about.lists).some(({ errors }) => errors);
      add("Standard errors", each ? "of each effect, over rollouts" : "of each vector one, the root mean square over its features' effects");
    }
    add("Effects", "Mean feature activation of steered text less that of unsteered text, over all positions; the scale is the length that is added to the residual stream.");
    for (const [name, reason] of Object.entries(about.missing)) add(`No ${name}`, reason);
    return card("In this page", "", list);
  }

  // ---- search ------------------------------------------------------------------------------------------------------------

  let known = null; // everything that can be found, in lower case

  function index() {
    if (known) return known;
    known = [];
    const lower = (text) => plain(text).toLowerCase();
    for (let feature = 0; feature < about.features; feature++) {
      const contexts = (texts.contexts && texts.contexts[feature]) || [];
      known.push({
        feature,
        label: lower(labelOf(feature)),
        firing: lower(contexts.map((context) => context[2]).join(" ")),
        tokens: lower(((texts.tokens && texts.tokens[feature]) || []).join(" ")),
        contexts: lower(contexts.map((context) => context.slice(1).join("")).join(" ")),
      });
    }
    vectors.id.forEach((id, number) => {
      if (vectors.feature[number] < 0 || vectors.names[number]) known.push({ number, label: lower(titleOf(number)), id });
    });
    return known;
  }

  const startsWord = (text, word) => text.startsWith(word) || text.includes(` ${word}`);

  // How well a thing answers, and why; 0 where it does not.
  function fits(thing, words, query) {
    if (thing.feature !== undefined && String(thing.feature) === query) return [100, "this feature"];
    if (thing.id === query) return [100, "this vector"];
    if (words.every((word) => startsWord(thing.label, word))) return [thing.label === query ? 90 : 80, "label"];
    if (words.every((word) => thing.label.includes(word))) return [70, "label"];
    if (thing.feature === undefined) return [0, ""];
    if (words.every((word) => startsWord(thing.firing, word))) return [60 + 5 * (thing.firing.split(query).length > 3), "fires on it"];
    if (words.every((word) => startsWord(thing.tokens, word))) return [50, "top tokens"];
    if (query.length > 1 && words.every((word) => startsWord(thing.contexts, word))) return [40, "contexts"];
    if (/^\d+$/.test(query) && String(thing.feature).startsWith(query)) return [30, ""];
    return [0, ""];
  }

  function search(text) {
    const query = plain(text).trim().toLowerCase();
    const words = query.split(" ");
    const found = index().map((thing) => ({ thing, fit: fits(thing, words, query) })).filter(({ fit }) => fit[0]);
    return found.sort((a, b) => b.fit[0] - a.fit[0]);
  }

  // What answers a search that is in the address, where nothing was chosen yet.
  function resultsView(query) {
    const found = search(query);
    const rows = found.slice(0, LISTED).map(({ thing }) => {
      if (thing.feature === undefined) return toVector(thing.number);
      const made = toFeature(thing.feature);
      const context = ((texts.contexts && texts.contexts[thing.feature]) || [])[0];
      if (context) made.append(marked(context));
      return made;
    });
    const words = `${whole(found.length)} found for “${query}”${found.length > LISTED ? `, the ${LISTED} best shown` : ""}.`;
    return { title: `“${query}”`, content: [element("h1", "", "Search"), element("p", "lead", words), linkList(rows)] };
  }

  let chosen = -1;

  function close() {
    byId("found").hidden = true;
    byId("query").setAttribute("aria-expanded", "false");
    byId("query").removeAttribute("aria-activedescendant");
    chosen = -1;
  }

  function choose(place) {
    const options = byId("found").querySelectorAll("[role=option]");
    if (!options.length) return;
    chosen = (place + options.length) % options.length;
    options.forEach((option, at) => option.setAttribute("aria-selected", String(at === chosen)));
    options[chosen].scrollIntoView({ block: "nearest" });
    byId("query").setAttribute("aria-activedescendant", options[chosen].id);
  }

  function suggest() {
    const text = byId("query").value;
    if (!text.trim()) {
      close();
      byId("counted").textContent = "";
      return;
    }
    const found = search(text);
    const options = found.slice(0, SHOWN).map(({ thing, fit }, at) => {
      const option = element("li");
      option.id = `found-${at}`;
      option.setAttribute("role", "option");
      option.setAttribute("aria-selected", "false");
      const feature = thing.feature;
      option.dataset.address = address(feature !== undefined ? { feature, query: text } : { vector: vectors.id[thing.number], query: text });
      option.append(element("b", "", feature !== undefined ? String(feature) : titleOf(thing.number)));
      if (feature !== undefined) option.append(aboutFeature(feature, 5));
      option.append(element("span", "why", fit[1]));
      option.addEventListener("mousedown", (event) => event.preventDefault());
      option.addEventListener("click", () => go(option.dataset.address));
      return option;
    });
    const words = found.length ? `${whole(found.length)} found${found.length > SHOWN ? `, ${SHOWN} shown` : ""}` : "Nothing found";
    if (!found.length || found.length > SHOWN) {
      const last = element("li", "nothing", words);
      last.setAttribute("role", "presentation");
      options.push(last);
    }
    byId("found").replaceChildren(...options);
    byId("found").hidden = false;
    byId("query").setAttribute("aria-expanded", "true");
    byId("counted").textContent = words;
    choose(0);
  }

  function go(where) {
    close();
    location.hash = where;
    byId("main").focus();
  }

  function listen() {
    const query = byId("query");
    query.addEventListener("input", () => {
      suggest();
      history.replaceState({ seen: true }, "", address({ ...state(), query: query.value }));
    });
    query.addEventListener("focus", () => query.value && query.select());
    query.addEventListener("blur", close);
    query.addEventListener("keydown", (event) => {
      const open = !byId("found").hidden;
      if (event.key === "ArrowDown") open ? choose(chosen + 1) : suggest();
      else if (event.key === "ArrowUp" && open) choose(chosen - 1);
      else if (event.key === "Home" && open && event.ctrlKey) choose(0);
      else if (event.key === "Escape") open ? close() : query.blur();
      else return;
      event.preventDefault();
    });
    byId("search").addEventListener("submit", (event) => {
      event.preventDefault();
      if (byId("found").hidden) suggest();
      const option = byId("found").querySelectorAll("[role=option]")[chosen];
      if (option) go(option.dataset.address);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
      if (document.activeElement.matches("input[type=text]")) return;
      event.preventDefault();
      query.focus();
    });
    window.addEventListener("popstate", () => {
      const back = history.state !== null; // where the page was before; the browser scrolls there
      show().then(() => {
        if (!back) window.scrollTo(0, 0);
        history.replaceState({ seen: true }, "");
      });
    });
  }

  async function begin() {
    byId("home").textContent = about.title;
    byId("setting").textContent = `${about.model} · ${about.hook} · ${about.sae}`;
    byId("foot").append(
      element("p", "", `Of every list the ${about.top} entries largest in size are kept. This file: ${(about.bytes / 1e6).toFixed(1)} MB; it asks for nothing from any network. Made by saets ${about.version}.`),
    );
    await load();
    listen();
    await show();
    document.body.dataset.ready = "yes";
  }

  begin();
})();
