// Controls, plots and read-outs that follow the model, and what shows a figure in a page or a notebook.

// the stage: what is drawn follows the model --------------------------------------------------------

// Everything is appended to `el` in the order of the calls; controls that follow each other share a row.
function makeStage(model, el) {
  const draws = [], undo = [];
  let queued = false;
  const redraw = () => {
    if (queued) return;
    queued = true;
    // once after all changes of one event, so that no draw sees half of them
    queueMicrotask(() => { queued = false; draws.forEach((draw) => draw()); });
  };
  model.on("change", redraw);
  undo.push(() => model.off("change", redraw));
  // a notebook takes the arrows and single letters for commands on its cells: keys used here stay here
  const keep = (event) => {
    if (!(event.ctrlKey || event.metaKey || event.altKey || event.key === "Escape")) event.stopPropagation();
  };
  el.addEventListener("keydown", keep);
  undo.push(() => el.removeEventListener("keydown", keep));

  const stage = {
    get: (key) => model.get(key),
    // stage.set({ chunk: 16, step: 0 })
    set(changes) {
      for (const [key, value] of Object.entries(changes)) model.set(key, value);
      model.save_changes();
    },
    // run now and after every change of the model
    draw(run) { draws.push(run); run(); },
    cleanup() { undo.forEach((run) => run()); el.replaceChildren(); },
    undo,
    append(node) { el.append(node); return node; },
    control(node) {
      if (!el.lastElementChild?.matches(".explorable-controls")) el.append(htmlElement("div", { class: "explorable-controls" }));
      el.lastElementChild.append(node);
      return node;
    },
  };
  for (const [name, add] of Object.entries({ slider, toggle, select, button, player, readout, plot })) {
    stage[name] = (...args) => add(stage, ...args);
  }
  return stage;
}

// stage.slider("gamma", { label: "decay", min: 0.8, max: 1, step: 0.01 }), or values: [16, 32, 64] in place of min..step
function slider(stage, key, { label, min = 0, max = 1, step = 0.01, values = null, format = formatNumber }) {
  const output = htmlElement("output");
  const input = htmlElement("input", {
    type: "range", min: values ? 0 : min, max: values ? values.length - 1 : max, step: values ? 1 : step,
    input: () => stage.set({ [key]: values ? values[Number(input.value)] : Number(input.value) }),
  });
  const node = htmlElement("label", { class: "slider" }, htmlElement("span", {}, label), output, input);
  stage.draw(() => {
    const value = stage.get(key), words = format(value);
    input.value = values ? nearestOf(values, value) : value;
    input.setAttribute("aria-valuetext", words);
    output.textContent = words;
  });
  return stage.control(node);
}

// index of the value, or of the number next to it, as Python may set one that is not in the list
function nearestOf(values, value) {
  const at = values.indexOf(value);
  return at >= 0 ? at : values.reduce((best, x, i) => (Math.abs(x - value) < Math.abs(values[best] - value) ? i : best), 0);
}

// a check box for a true / false key
function toggle(stage, key, { label }) {
  const input = htmlElement("input", { type: "checkbox", change: () => stage.set({ [key]: input.checked }) });
  stage.draw(() => { input.checked = Boolean(stage.get(key)); });
  return stage.control(htmlElement("label", {}, input, htmlElement("span", {}, label)));
}

// options: ["softmax", "elu + 1"], or [["elu", "elu + 1"], ...] as pairs of value and words
function select(stage, key, { label, options }) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const input = htmlElement("select", { change: () => stage.set({ [key]: pairs[input.selectedIndex][0] }) },
    ...pairs.map(([, words]) => htmlElement("option", {}, String(words))));
  stage.draw(() => { input.selectedIndex = pairs.findIndex(([value]) => value === stage.get(key)); });
  return stage.control(htmlElement("label", {}, htmlElement("span", {}, label), input));
}

// disabled: a function of no arguments, asked at every draw
function button(stage, { label, press, disabled = null }) {
  const node = htmlElement("button", { type: "button", click: press }, label);
  if (disabled) stage.draw(() => { node.disabled = disabled(); });
  return stage.control(node);
}

// Step, Play and Start over for a whole number that runs from 0 to max (a number, or a function that gives it)
function player(stage, key, { label, max, interval = 400 }) {
  const last = () => (typeof max === "function" ? max() : max);
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  const step = () => {
    if (stage.get(key) < last()) stage.set({ [key]: stage.get(key) + 1 });
    if (stage.get(key) >= last()) stop();
  };
  const input = slider(stage, key, { label, min: 0, max: last(), step: 1 }).querySelector("input");
  button(stage, { label: "Step", press: () => { stop(); step(); }, disabled: () => stage.get(key) >= last() });
  const play = button(stage, {
    label: "Play",
    press: () => {
      if (timer) { stop(); return; }
      if (stage.get(key) >= last()) stage.set({ [key]: 0 });
      play.textContent = "Pause";
      timer = setInterval(step, interval);
    },
  });
  button(stage, { label: "Start over", press: () => { stop(); stage.set({ [key]: 0 }); } });
  stage.draw(() => { input.max = last(); });
  stage.undo.push(stop);
}

// the numbers of the figure in a sentence, read aloud when it changes; words: a function that gives text or a node
function readout(stage, words) {
  const node = stage.append(htmlElement("p", { class: "explorable-readout", role: "status", "aria-live": "polite" }));
  stage.draw(() => {
    const text = words();
    if (typeof text !== "string") node.replaceChildren(text);
    else if (node.textContent !== text) node.textContent = text;
  });
  return node;
}

// A drawing as wide as the page allows, at most 680 px, cleared and drawn anew after every change:
// draw(layer, width, height) appends to `layer`. label: words, or a function that gives them.
// handles: things to drag or to move by the arrow keys, each { label, at: (width) => [x, y], move: (x, y, width) => {},
// nudge: (dx, dy) => {} with dx, dy in {-1, 0, 1} (dy is 1 upwards), text: () => "what it is set to", fill }.
function plot(stage, { height = 260, label, draw, handles = [], interactive = false }) {
  const layer = svgElement("g"), group = handles.length || interactive;
  const svg = stage.append(svgElement("svg", { role: group ? "group" : "img" }, layer));
  const box = () => ({
    width: Math.max(280, Math.min(680, Math.round(svg.parentElement?.clientWidth || 680))),
  });
  const knobs = handles.map((handle) => makeKnob(svg, handle, () => box().width));
  const paint = () => {
    const { width } = box(), tall = typeof height === "function" ? height(width) : height;
    for (const [name, value] of Object.entries({ width, height: tall, viewBox: `0 0 ${width} ${tall}` })) svg.setAttribute(name, value);
    svg.setAttribute("aria-label", typeof label === "function" ? label() : label);
    layer.replaceChildren();
    draw(layer, width, tall);
    knobs.forEach((place) => place());
  };
  let seen = box().width;
  const watch = new ResizeObserver(() => { if (box().width !== seen) { seen = box().width; paint(); } });
  watch.observe(svg.parentElement);
  stage.undo.push(() => watch.disconnect());
  stage.draw(paint);
  return svg;
}

function makeKnob(svg, { label, at, move, nudge, text, fill = color("accent"), radius = 9 }, width) {
  const knob = svgElement("circle", {
    r: radius, fill, stroke: color("paper"), "stroke-width": 2, tabindex: 0, role: "slider", "aria-label": label,
    pointerdown: (event) => { knob.setPointerCapture(event.pointerId); event.preventDefault(); knob.focus(); },
    pointermove: (event) => {
      if (!knob.hasPointerCapture(event.pointerId)) return;
      const frame = svg.getBoundingClientRect(), zoom = svg.viewBox.baseVal.width / frame.width;
      move((event.clientX - frame.left) * zoom, (event.clientY - frame.top) * zoom, width());
    },
    keydown: (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (step) { event.preventDefault(); nudge(...step); }
    },
  });
  svg.append(knob);
  return () => {
    const [x, y] = at(width());
    for (const [name, value] of Object.entries({ cx: x, cy: y, "aria-valuenow": Math.round(x), "aria-valuetext": text() })) {
      knob.setAttribute(name, value);
    }
  };
}

// where a figure runs -------------------------------------------------------------------------------

// the part of anywidget's model that a figure uses, over a plain object
function staticModel(state) {
  const listeners = new Map();
  const emit = (event, value) => [...(listeners.get(event) ?? [])].forEach((run) => run(value));
  return {
    get: (key) => state[key],
    set(key, value) {
      if (state[key] === value) return;
      state[key] = value;
      emit(`change:${key}`, value);
      emit("change");
    },
    save_changes() {},
    on(event, run) { listeners.set(event, [...(listeners.get(event) ?? []), run]); },
    off(event, run) { listeners.set(event, (listeners.get(event) ?? []).filter((other) => run && other !== run)); },
  };
}

// in a page: the newest element of that id that is still empty
function drawFigure(id, figure) {
  const root = document.querySelector(`[id="${id}"]:not([data-drawn])`);
  if (!root) return;
  root.dataset.drawn = "";
  const el = root.querySelector(".explorable-body"), words = [...el.childNodes];
  try {
    el.replaceChildren();
    figure.render({ model: staticModel(JSON.parse(root.querySelector("script").textContent)), el });
  } catch (error) {
    el.replaceChildren(...words);
    throw error;
  }
}

function asWidget(figure, words) {
  return {
    render(context) {
      context.el.classList.add("explorable");
      withParts(context.el, { role: "group", "aria-label": words }, []);
      return figure.render(context);
    },
  };
}
