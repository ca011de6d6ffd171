// Eight tokens over a memory of two rows; a gate under every token says what each row keeps of its past.

const ROWS = [["name_gates", "row of the name"], ["code_gates", "row of the code"]];
const round = (x) => Math.round(20 * x) / 20;

// states after every token, [token][row][value], and what the questions read
function follow(tokens, gates, leftover) {
  const states = [], reads = [];
  let S = [[0, 0, 0], [0, 0, 0]];
  tokens.forEach(([, , kind, row, value], t) => {
    S = S.map((line, r) => line.map((x, v) => {
      const writes = kind === "write" && v === value && (leftover || r === row);
      return gates[r][t] * x + (writes ? (leftover ? 1 - gates[r][t] : 1) : 0);
    }));
    states.push(S);
    if (kind === "ask") reads.push({ t, row, value, seen: S[row], error: S[row].reduce((sum, x, v) => sum + (x - (v === value)) ** 2, 0) });
  });
  return { states, reads, error: reads.reduce((sum, q) => sum + q.error, 0) };
}

// the one constant gate with the least error
function bestConstant(tokens, leftover) {
  const all = Array.from({ length: 201 }, (_, i) => i / 200);
  const error = (g) => follow(tokens, [tokens.map(() => g), tokens.map(() => g)], leftover).error;
  return all.reduce((best, g) => (error(g) < error(best) ? g : best), 1);
}

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), tokens = stage.get("tokens"), values = stage.get("values");
    const paints = [color("accent"), color("second"), color("right")];
    const gates = () => ROWS.map(([key]) => stage.get(key));
    const now = () => follow(tokens, gates(), stage.get("leftover"));
    const put = (name, code, tied) => stage.set({ name_gates: name, code_gates: tied ? name : code, tied });
    const all = (g) => tokens.map(() => g), at = (places, g) => tokens.map((_, t) => (places.includes(t) ? g : 1));

    stage.button({ label: "Keep all", press: () => put(all(1), all(1), true) });
    stage.button({ label: "Fixed decay", press: () => { const g = bestConstant(tokens, stage.get("leftover")); put(all(g), all(g), true); } });
    stage.button({ label: "One gate", press: () => { const g = at([4], 0.5); put(g, g, true); } });
    stage.button({ label: "A gate a row", press: () => (stage.get("leftover") ? put(at([0], 0), at([1, 5], 0), false) : put(all(1), at([4], 0), false)) });
    stage.control(toggleTied(stage));
    stage.toggle("leftover", { label: "write what the gate leaves over (HGRN2)" });

    const left = 34, head = 42, band = 148, track = [22, 76], bars = [90, 138];
    const column = (width, t) => left + ((width - left - 6) * (t + 0.5)) / tokens.length;
    const level = (row) => linearScale([0, 1], [head + row * band + track[1], head + row * band + track[0]]);
    const handles = ROWS.flatMap(([key, words], row) => tokens.map(([first, second], t) => {
      const set = (value) => {
        const line = stage.get(key).map((x, i) => (i === t ? Math.max(0, Math.min(1, round(value))) : x));
        stage.set(stage.get("tied") ? { name_gates: line, code_gates: line } : { [key]: line });
      };
      return {
        label: `gate of the ${words} at token ${t + 1}, ${first} ${second}`, radius: 8, fill: color("ink"),
        at: (width) => [column(width, t), level(row)(stage.get(key)[t])],
        move: (x, y) => set(level(row).invert(y)),
        nudge: (dx, dy) => set(stage.get(key)[t] + 0.05 * (dx || dy)),
        text: () => formatNumber(stage.get(key)[t], 2),
      };
    }));

    stage.plot({
      height: head + 2 * band,
      label: () => "Two rows of a memory under eight tokens; the read-out below has the answers",
      handles,
      draw(layer, width) {
        const { states, reads } = now(), cell = (width - left - 6) / tokens.length;
        tokens.forEach(([first, second, kind], t) => {
          const x = column(width, t), asked = kind === "ask";
          if (asked) layer.append(svgElement("rect", { x: x - cell / 2 + 1, y: 0, width: cell - 2, height: head + 2 * band, fill: color("panel") }));
          const size = width < 420 ? "font-size:11px" : "";
          layer.append(svgText(x, 14, first, { anchor: "middle", "font-weight": 600, style: size }), svgText(x, 31, second, { anchor: "middle", class: asked ? "muted" : "", style: size }));
        });
        ROWS.forEach(([, words], row) => {
          const y = level(row), top = head + row * band, floor = top + bars[1], h = bars[1] - bars[0];
          layer.append(
            svgText(left - 28, top + 12, words, { class: "muted" }),
            svgText(left - 8, y(1) + 4, "1", { anchor: "end", class: "muted" }), svgText(left - 8, y(0) + 4, "0", { anchor: "end", class: "muted" }),
            svgElement("line", { x1: left, x2: width - 6, y1: y(1), y2: y(1), stroke: color("line") }),
            svgElement("line", { x1: left, x2: width - 6, y1: y(0), y2: y(0), stroke: color("line") }),
            svgElement("line", { x1: left, x2: width - 6, y1: floor, y2: floor, stroke: color("muted") }),
          );
          tokens.forEach((_, t) => {
            const x = column(width, t), w = Math.min(12, cell / 4);
            layer.append(svgElement("line", { x1: x, x2: x, y1: y(0), y2: y(1), stroke: color("line") }));
            states[t][row].forEach((value, v) => {
              if (value > 0.004) layer.append(svgElement("rect", { x: x + (v - 1.5) * (w + 1), y: floor - h * Math.min(1, value), width: w, height: h * Math.min(1, value), fill: paints[v] }));
            });
          });
          for (const q of reads.filter((one) => one.row === row)) {
            layer.append(svgElement("rect", {
              x: column(width, q.t) - cell / 2 + 1.5, y: top + bars[0] - 3, width: cell - 3, height: h + 4, fill: "none",
              stroke: q.error < 0.02 ? color("right") : color("wrong"), "stroke-width": 2, "stroke-dasharray": q.error < 0.02 ? null : "4 3",
            }));
          }
        });
      },
    });
    const legend = htmlElement("p", { class: "explorable-alt" }, "Bars, left to right: ");
    values.forEach((name, v) => legend.append(htmlElement("span", { style: `color:${paints[v]};font-weight:600` }, name), v < 2 ? ", " : ". A frame is a question; it is solid when the answer is right."));
    stage.append(legend);

    stage.readout(() => {
      const { reads, error } = now(), tied = stage.get("tied");
      const said = reads.map(({ t, row, value, seen, error: off }) => {
        const held = seen.map((x, v) => [x, v]).filter(([x]) => x > 0.004).sort((a, b) => b[0] - a[0]).map(([x, v]) => `${values[v]} at ${formatNumber(x, 2)}`).join(" and ");
        return `The ${row ? "code" : "name"}, asked at token ${t + 1}: ${held || "nothing"}, ${off < 0.02 ? "right" : `expected ${values[value]}`}.`;
      });
      const bound = tied && !stage.get("leftover") ? " With one gate for both rows no setting gets below 0.5." : "";
      return `${said.join(" ")} Squared error of the three answers: ${formatNumber(error < 5e-4 ? 0 : error, 2)}.${bound}`;
    });
    return stage.cleanup;
  },
};

// a check box that also copies the gates of the name to the code
function toggleTied(stage) {
  const input = htmlElement("input", {
    type: "checkbox",
    change: () => stage.set(input.checked ? { tied: true, code_gates: stage.get("name_gates") } : { tied: false }),
  });
  stage.draw(() => { input.checked = Boolean(stage.get("tied")); });
  return htmlElement("label", {}, input, htmlElement("span", {}, "one gate for both rows"));
}
