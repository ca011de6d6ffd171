// A board of four facts: write, replace and wipe, four memories side by side, and the eigenvalues of a token.

const TOP = 1.7, WIPED = 0.02, FACTS = ["A", "B", "C", "D"];
const ORDERS = { first: "decays, then corrects", survey: "corrects what was there before the decay", last: "corrects, then decays" };

const inner = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const tidy = (x) => (Math.abs(x) < 5e-3 ? "0" : formatNumber(x, Math.abs(x) < 0.1 ? 1 : Math.abs(x) < 1 ? 2 : 3)).replace("-", "−");
const multiply = (A, B) => A.map((row) => B[0].map((_, j) => row.reduce((sum, x, i) => sum + x * B[i][j], 0)));

// four keys of length 1 with the same overlap c between any two: rows of the root of (1 - c) I + c J
const keysOf = (c) => {
  const own = Math.sqrt(1 - c), all = (Math.sqrt(1 + 3 * c) - own) / 4;
  return FACTS.map((_, i) => FACTS.map((_, j) => all + (i === j ? own : 0)));
};

// characteristic polynomial by Faddeev and LeVerrier, its roots by Durand and Kerner
const eigenvalues = (A) => {
  const n = A.length, c = [1];
  let M = A.map((row) => row.map(() => 0));
  for (let k = 1; k <= n; k++) {
    M = multiply(A, M).map((row, i) => row.map((x, j) => x + (i === j ? c[k - 1] : 0)));
    c.push(-multiply(A, M).reduce((sum, row, i) => sum + row[i], 0) / k);
  }
  let roots = A.map((_, i) => [0.9 * Math.cos(1.3 + 2 * i), 0.9 * Math.sin(1.3 + 2 * i)]);
  const times = ([a, b], [p, q]) => [a * p - b * q, a * q + b * p];
  for (let round = 0; round < 150; round++) {
    roots = roots.map((z, i) => {
      const value = c.reduce((sum, x) => { const [a, b] = times(sum, z); return [a + x, b]; }, [0, 0]);
      const [p, q] = roots.reduce((all, w, j) => (i === j ? all : times(all, [z[0] - w[0], z[1] - w[1]])), [1, 0]);
      const size = p * p + q * q;
      return size < 1e-30 ? z : [z[0] - (value[0] * p + value[1] * q) / size, z[1] - (value[1] * p - value[0] * q) / size];
    });
  }
  return roots;
};

export default {
  render({ model, el }) {
    const stage = makeStage(model, el);
    const names = ["adding", "decay", "delta rule", "gated delta"];
    const paints = [color("muted"), familyColor("gated decay"), color("accent"), familyColor("delta rule")];

    const now = () => {
      const keys = keysOf(stage.get("overlap")), beta = stage.get("beta"), gate = stage.get("gate"), order = stage.get("order");
      let S = names.map(() => [0, 0, 0, 0]), truth = [0, 0, 0, 0];
      const steps = [];
      for (const [fact, value] of stage.get("tokens")) {
        const wipe = fact < 0, a = wipe ? WIPED : gate, b = wipe ? 0 : beta, k = keys[wipe ? 0 : fact];
        const add = (P, share, step) => P.map((x, i) => share * x + step * k[i]);
        const [plus, decay, delta, both] = S, old = inner(k, both);
        const next = order === "first" ? add(both, a, b * (value - a * old)) : add(both, a, (order === "last" ? a : 1) * b * (value - old));
        S = [wipe ? plus : add(plus, 1, value), add(decay, a, wipe ? 0 : value), add(delta, 1, b * (value - inner(k, delta))), next];
        truth = wipe ? [0, 0, 0, 0] : truth.map((x, i) => (i === fact ? value : x));
        const erased = order === "survey" ? b : a * b;
        steps.push(k.map((x, i) => k.map((y, j) => (i === j ? a : 0) - erased * x * y)));
      }
      const answers = S.map((P) => keys.map((k) => inner(k, P)));
      const off = answers.map((row) => Math.max(...row.map((x, i) => Math.abs(x - truth[i]))));
      const last = steps.at(-1), two = steps.length > 1 ? multiply(last, steps.at(-2)) : null;
      return { answers, truth, off, one: last ? eigenvalues(last) : [], two: two ? eigenvalues(two) : [], count: steps.length };
    };
    let state = null;
    stage.draw(() => { state = now(); });

    stage.select("fact", { label: "fact", options: FACTS.map((name, i) => [i, name]) });
    stage.slider("value", { label: "its new value", min: -1.5, max: 1.5, step: 0.1, format: tidy });
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    const full = () => stage.get("tokens").length >= stage.get("most"), none = () => stage.get("tokens").length === 0;
    stage.button({
      label: "Write this fact", disabled: full,
      press: () => stage.set({ tokens: [...stage.get("tokens"), [stage.get("fact"), stage.get("value")]] }),
    });
    stage.button({ label: "Wipe the board", disabled: full, press: () => stage.set({ tokens: [...stage.get("tokens"), [-1, 0]] }) });
    stage.button({ label: "Take back", disabled: none, press: () => stage.set({ tokens: stage.get("tokens").slice(0, -1) }) });
    stage.button({ label: "Start empty", disabled: none, press: () => stage.set({ tokens: [] }) });
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    stage.slider("beta", { label: "strength β of a write", min: 0, max: 2, step: 0.05, format: tidy });
    stage.slider("gate", { label: "gate α at a write", min: 0, max: 1, step: 0.05, format: tidy });
    stage.slider("overlap", { label: "overlap of two keys", min: 0, max: 0.8, step: 0.05, format: tidy });
    stage.select("order", {
      label: "gated delta:",
      options: [["first", "decay, then correct"], ["survey", "correct what was there before the decay"], ["last", "correct, then decay"]],
    });

    // two by two panels with the circle at the right, or below them on a narrow page
    const layout = (width) => {
      const wide = width >= 600, area = wide ? width - 260 : width, w = (area - 62) / 2, h = wide ? 112 : 104;
      const boxes = names.map((_, i) => ({ x: 34 + (i % 2) * (w + 22), y: 28 + Math.floor(i / 2) * (h + 52), w, h }));
      const size = wide ? 214 : Math.min(width - 60, 230), left = wide ? width - size - 14 : (width - size) / 2, top = wide ? 42 : 2 * h + 146;
      return { boxes, height: wide ? 2 * h + 106 : top + size + 48, circle: { left, top, size } };
    };

    const drawPanel = (layer, { x, y, w, h }, i) => {
      const read = linearScale([-TOP, TOP], [y + h, y]), column = (j) => x + (w * (j + 0.5)) / 4;
      const right = state.off[i] < 0.05, held = (v) => Math.max(-TOP, Math.min(TOP, v));
      layer.append(
        svgElement("rect", { x, y, width: w, height: h, fill: color("panel") }),
        axis(read, { side: "left", at: x, label: "", ticks: [-1, 0, 1], grid: w }),
        svgText(x, y - 9, names[i], { "font-weight": 600 }),
        svgText(x + w, y - 9, right ? "all right" : `off by ${tidy(state.off[i])}`, { anchor: "end", style: `fill:${color(right ? "right" : "wrong")}` }),
      );
      state.truth.forEach((truth, j) => {
        const answer = state.answers[i][j], at = read(held(answer)), cx = column(j), out = Math.abs(answer) > TOP;
        if (Math.abs(answer - truth) > 0.02) {
          layer.append(svgElement("line", { x1: cx, x2: cx, y1: read(truth), y2: at, stroke: color("wrong"), "stroke-width": 3 }));
        }
        layer.append(
          svgElement("circle", { cx, cy: read(truth), r: 8, fill: "none", stroke: color("ink"), "stroke-width": 1.5 }),
          svgElement("circle", { cx, cy: at, r: 5, fill: out ? color("panel") : paints[i], stroke: paints[i], "stroke-width": 2 }),
          svgText(cx, y + h + 16, FACTS[j], { anchor: "middle", ...(j === stage.get("fact") ? { "font-weight": 700 } : { class: "muted" }) }),
        );
      });
    };

    const drawCircle = (layer, { left, top, size }) => {
      const x = linearScale([-1.15, 1.15], [left, left + size]), y = linearScale([-1.15, 1.15], [top + size, top]);
      layer.append(
        svgText(left, top - 22, "eigenvalues of gated delta", { "font-weight": 600 }),
        svgElement("rect", { x: left, y: top, width: size, height: size, fill: color("panel") }),
        svgElement("circle", { cx: x(0), cy: y(0), r: x(1) - x(0), fill: "none", stroke: color("line"), "stroke-width": 1.5 }),
        svgLine([[x(-1.15), y(0)], [x(1.15), y(0)]], { stroke: color("line"), "stroke-width": 1 }),
        svgLine([[x(0), y(-1.15)], [x(0), y(1.15)]], { stroke: color("line"), "stroke-width": 1 }),
      );
      for (const [word, at] of [["−1", -1], ["1", 1]]) layer.append(svgText(x(at), y(0) + 25, word, { anchor: "middle", class: "muted" }));
      state.two.forEach(([a, b]) => layer.append(svgElement("rect", { x: x(a) - 4, y: y(b) - 4, width: 8, height: 8, fill: color("second") })));
      state.one.forEach(([a, b]) => layer.append(svgElement("circle", { cx: x(a), cy: y(b), r: 8, fill: "none", stroke: paints[3], "stroke-width": 2.5 })));
      layer.append(
        svgElement("circle", { cx: left + 8, cy: top + size + 16, r: 6, fill: "none", stroke: paints[3], "stroke-width": 2.5 }), svgText(left + 20, top + size + 20, "last token"),
        svgElement("rect", { x: left + 104, y: top + size + 12, width: 8, height: 8, fill: color("second") }), svgText(left + 118, top + size + 20, "last two"),
      );
    };

    stage.plot({
      height: (width) => layout(width).height,
      label: () => "Four panels, one a memory: rings are the true values of four facts, dots what the memory answers. Beside them the eigenvalues of the last tokens in the unit circle",
      draw(layer, width) {
        const f = layout(width);
        f.boxes.forEach((box, i) => drawPanel(layer, box, i));
        drawCircle(layer, f.circle);
      },
    });

    const spell = (roots) => {
      const groups = new Map();
      for (const [a, b] of roots) {
        const words = Math.abs(b) < 5e-3 ? tidy(a) : `${tidy(a)} ± ${tidy(Math.abs(b))}i`;
        groups.set(words, (groups.get(words) ?? 0) + 1);
      }
      return [...groups].map(([words, n]) => (n > 1 && !words.includes("i") ? `${words} (${n} times)` : words)).join(", ");
    };
    stage.readout(() => {
      const { off, one, two, count, truth, answers } = state, fact = stage.get("fact");
      const told = count ? `After ${count} ${count === 1 ? "token" : "tokens"}` : "With nothing written";
      const errors = names.map((name, i) => `${name} ${tidy(off[i])}`).join(", ");
      const last = one.length ? ` Eigenvalues of the last token: ${spell(one)}${two.length ? `; of the last two together: ${spell(two)}` : ""}.` : "";
      const asked = `Fact ${FACTS[fact]} is ${tidy(truth[fact])}, to become ${tidy(stage.get("value"))}; gated delta, which ${ORDERS[stage.get("order")]}, answers ${tidy(answers[3][fact])}.`;
      return `${told} the largest errors are: ${errors}. ${asked}${last}`;
    });
    return stage.cleanup;
  },
};
