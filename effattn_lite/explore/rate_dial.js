// Mixers ranked by a recorded accuracy; the bars change places with the learning rate and with who is tuned.

const ROW = 18, HEAD = 26;
const ordinal = (n) => n + (n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th");
const bestOf = (scores) => scores.reduce((best, score, i) => (score && (best < 0 || score[0] > scores[best][0]) ? i : best), -1);

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), tasks = stage.get("tasks"), rates = stage.get("rates"), titles = new Map(stage.get("names"));
    const still = globalThis.matchMedia?.("(prefers-reduced-motion: reduce)").matches;

    // one line a mixer: which of its rates counts, and what it scored there; without a run it comes last
    const ranking = (task, rate, tuned, mine) => {
      const at = rates.indexOf(rate);
      const lines = task.mixers.map((mixer) => {
        const free = tuned === "everybody" || (tuned === "mine" && mixer.name === mine), i = free ? bestOf(mixer.scores) : at;
        return { ...mixer, i, free, score: mixer.scores[i] ?? null };
      });
      return lines.sort((a, b) => (b.score?.[0] ?? -1) - (a.score?.[0] ?? -1) || (a.name < b.name ? -1 : 1));
    };
    // as many as score more, and one: equals share a place
    const place = (lines, name) => {
      const own = lines.find((line) => line.name === name);
      return own?.score ? 1 + lines.filter((line) => line.score && line.score[0] > own.score[0]).length : null;
    };
    let state = null, last = new Map();
    stage.draw(() => {
      const [task, rate, tuned, mine] = [tasks[stage.get("task")], ...["rate", "tuned", "mine"].map(stage.get)];
      state = { task, rate, tuned, mine, lines: ranking(task, rate, tuned, mine), best: ranking(task, rate, "everybody", mine) };
    });

    if (tasks.length > 1) stage.select("task", { label: "task", options: tasks.map(({ label }, i) => [i, label]) });
    stage.select("mine", { label: "my method", options: [...titles] });
    stage.append(htmlElement("div", { class: "explorable-controls" }));
    stage.slider("rate", { label: "learning rate", values: rates, format: String });
    stage.select("tuned", { label: "best of all rates for", options: [["nobody", "nobody"], ["mine", "mine alone"], ["everybody", "everybody"]] });

    const rows = Math.max(...tasks.map((task) => task.mixers.length)), floor = HEAD + rows * ROW;
    stage.plot({
      height: floor + 46, interactive: true,
      label: () => `${state.task.label}: bars of accuracy, best first; the read-out below has the numbers`,
      draw(layer, width) {
        const wide = width >= 540, left = wide ? 158 : 148, right = width - (wide ? 150 : 52), x = linearScale([0, 1], [left, right]);
        layer.append(
          axis(x, { at: floor, label: "share of right answers", ticks: wide ? 5 : 2, grid: rows * ROW }),
          svgElement("line", { x1: x(state.task.floor), x2: x(state.task.floor), y1: HEAD - 6, y2: floor, stroke: color("second"), "stroke-width": 1.5, "stroke-dasharray": "4 3" }),
          svgText(x(state.task.floor), HEAD - 11, "floor", { anchor: "middle", style: `fill:${color("second")}` }),
        );
        if (wide) layer.append(svgText(right + 98, HEAD - 11, "rate", { anchor: "end", class: "muted" }), svgText(width, HEAD - 11, "state", { anchor: "end", class: "muted" }));
        const moved = new Map();
        state.lines.forEach((line, n) => {
          const own = line.name === state.mine, y = HEAD + n * ROW, mid = ROW / 2, weight = own ? { "font-weight": 700 } : {};
          const group = svgElement("g", { transform: `translate(0 ${y})`, style: "cursor:pointer", click: () => stage.set({ mine: line.name }) });
          group.append(svgElement("rect", { x: 0, y: 0.5, width, height: ROW - 1, fill: own ? color("panel") : "transparent" }));
          group.append(svgText(20, mid + 4.5, line.score ? place(state.lines, line.name) : "–", { anchor: "end", class: "muted" }), svgText(27, mid + 4.5, line.title, weight));
          if (line.score) {
            const [p, error] = line.score, low = x(Math.max(0, p - 2 * error)), high = x(Math.min(1, p + 2 * error)), edge = line.free && (line.i === 0 || line.i === rates.length - 1);
            group.append(
              svgElement("rect", { x: left, y: 3.5, width: Math.max(0.5, x(p) - left), height: ROW - 7, fill: familyColor(line.family), "fill-opacity": own ? 1 : 0.75 }),
              svgElement("line", { x1: low, x2: high, y1: mid, y2: mid, stroke: color("ink"), "stroke-width": 2 }),
              svgText(right + 44, mid + 4.5, p.toFixed(3), { anchor: "end", ...weight }),
            );
            if (wide) group.append(svgText(right + 98, mid + 4.5, `${edge ? "▸ " : ""}${rates[line.i]}`, { anchor: "end", class: "muted", ...(line.free ? { "font-weight": 700 } : {}) }));
          } else group.append(svgText(left + 6, mid + 4.5, "not run at this rate", { class: "muted" }));
          if (wide) group.append(svgText(width, mid + 4.5, line.state.toLocaleString("en"), { anchor: "end", class: "muted" }));
          layer.append(group);
          const before = last.get(line.name);
          if (!still && before != null && before !== y) {
            group.animate?.([{ transform: `translate(0px, ${before}px)` }, { transform: `translate(0px, ${y}px)` }], { duration: 600, easing: "ease-in-out" });
          }
          moved.set(line.name, y);
        });
        last = moved;
      },
    });
    stage.append(htmlElement("p", { class: "explorable-alt" },
      "Colours are families, whiskers two standard errors. The floor is what an answer scores that uses no key at all, or no bit. A bold rate was chosen, from those recorded; ▸ marks one at the end of the list."));

    stage.readout(() => {
      const { task, rate, tuned, mine, lines, best } = state, own = lines.find((line) => line.name === mine), title = titles.get(mine);
      const ran = lines.filter((line) => line.score), three = ran.slice(0, 3).map((line) => `${line.title} ${line.score[0].toFixed(3)}`).join(", ");
      const who = { nobody: `all learn at ${rate}`, mine: `${title} has its best rate, the others learn at ${rate}`, everybody: "each has its best rate" }[tuned];
      const now = place(lines, mine), then = place(best, mine);
      const said = !own ? `${title} was not run on this task.`
        : !own.score ? `${title} was not run at this rate.`
        : `${title} is ${ordinal(now)} of ${ran.length} with ${own.score[0].toFixed(3)} ± ${(2 * own.score[1]).toFixed(3)}`
          + (tuned === "everybody" ? `, at ${rates[own.i]}.` : `; with a sweep for everybody it would be ${ordinal(then)}.`);
      // pairs of mixers that change their order between this choice and a sweep for everybody
      const top = new Map(best.filter((line) => line.score).map((line) => [line.name, line.score[0]]));
      let turned = 0, pairs = 0;
      ran.forEach((a, i) => ran.slice(i + 1).forEach((b) => { pairs++; if ((a.score[0] - b.score[0]) * (top.get(a.name) - top.get(b.name)) < 0) turned++; }));
      const order = tuned === "everybody" ? "" : ` Of ${pairs} pairs ${turned} stand in another order than with a sweep for everybody.`;
      return `${task.label}, ${who}. In front: ${three}. ${said}${order}`;
    });
    return stage.cleanup;
  },
};
