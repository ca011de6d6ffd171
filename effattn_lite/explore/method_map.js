const STYLE = `
.method-map { position: relative; }
.method-map svg { height: 100%; inset: 0; max-width: none; pointer-events: none; position: absolute; width: 100%; }
.method-map section { border-top: 1px solid var(--figure-line); display: grid; gap: 4px 12px; grid-template-columns: 132px 1fr; padding: 6px 0; }
.method-map .family { font-size: 14px; line-height: 1.25; padding-top: 4px; }
.method-map .family::before { background: var(--family); border-radius: 2px; content: ""; display: inline-block; height: 10px; margin-right: 6px; width: 10px; }
.method-map ul { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; margin: 0; padding: 0; }
.method-map li { display: block; margin: 0; position: relative; z-index: 1; }
.method-map-story { position: sticky; top: 3.6rem; z-index: 2; }
.method-map a { background: var(--figure-paper); border: 1.5px dashed var(--family); border-radius: 6px; color: var(--figure-ink); cursor: default;
  display: block; font-size: 13.5px; line-height: 1.3; padding: 3px 8px 4px; text-decoration: none; }
.method-map a[href] { border-style: solid; border-width: 2px; cursor: pointer; font-weight: 600; text-decoration: none; }
.method-map a.shown, .method-map a:hover { background: var(--figure-panel); color: var(--figure-ink); outline: 2px solid var(--figure-accent); }
.method-map a.hidden { opacity: 0.2; }
.method-map .rooms { display: flex; gap: 3px; margin-top: 2px; }
.method-map .rooms i { border: 1px solid var(--family); border-radius: 1px; height: 6px; width: 10px; }
.method-map .rooms i.there { background: var(--family); }
.method-map-find { background: var(--figure-paper); border: 1px solid var(--figure-muted); border-radius: 6px; color: var(--figure-ink); font: inherit; min-height: 34px; padding: 2px 8px; width: 190px; }
@media (max-width: 520px) {
  .method-map section { grid-template-columns: 1fr; }
  .method-map svg { display: none; }
  .method-map a { font-size: 15px; padding: 6px 10px; }
}`;

export default {
  render({ model, el }) {
    const stage = makeStage(model, el), methods = stage.get("methods");
    const byName = Object.fromEntries(methods.map((method) => [method.name, method]));
    const short = ({ title }) => title.split(" (")[0];
    const matches = ({ name, title, family, aliases }) =>
      `${name} ${title} ${family} ${aliases}`.toLowerCase().includes(stage.get("find").trim().toLowerCase());
    el.append(htmlElement("style", {}, STYLE));

    const find = htmlElement("input", { type: "search", class: "method-map-find", input: () => stage.set({ find: find.value, shown: "" }) });
    stage.control(htmlElement("label", {}, htmlElement("span", {}, "Find a method"), find));
    stage.toggle("lines", { label: "lines: exact limits" });
    const story = stage.readout(() => {
      const method = byName[stage.get("shown")], written = methods.filter(({ page }) => page).length;
      if (method) return tell(method);
      const called = methods.filter(matches).map(short);
      if (stage.get("find").trim()) return `${called.length} of ${methods.length} fit: ${called.slice(0, 8).join(", ") || "none"}${called.length > 8 ? ", …" : ""}.`;
      return `${methods.length} methods, ${written} with a chapter to read. A filled square is a room that exists; point at a method for its story.`;
    });
    story.classList.add("method-map-story");

    const pills = Object.fromEntries(methods.map((method) => [method.name, pill(method)]));
    const lines = svgElement("svg", { "aria-hidden": "true" });
    const map = htmlElement("div", { class: "method-map" }, ...[...new Set(methods.map(({ family }) => family))].map((family) =>
      htmlElement("section", { style: `--family: ${familyColor(family)}`, "aria-label": family },
        htmlElement("div", { class: "family" }, family),
        htmlElement("ul", {}, ...methods.filter((method) => method.family === family).map(({ name }) => htmlElement("li", {}, pills[name]))))), lines);
    stage.append(map);

    // chapters lie beside a page of the book, which Sphinx marks; elsewhere only a whole address leads to one
    function target({ page }) {
      if (!page || "content_root" in document.documentElement.dataset) return { href: page };
      return /^https?:/.test(page) ? { href: page, target: "_blank", rel: "noopener" } : {};
    }

    function pill(method) {
      const show = () => stage.set({ shown: method.name });
      const to = target(method), link = to.href ? to : { role: "link", "aria-disabled": "true", tabindex: 0 };
      return htmlElement("a", { ...link, pointerenter: show, focus: show, click: show }, short(method),
        htmlElement("span", { class: "rooms", "aria-hidden": "true" }, ...method.rooms.map(([, there]) => htmlElement("i", { class: there ? "there" : "" }))));
    }

    function tell(method) {
      const { title, family, survey, rooms, page, limits } = method;
      const where = survey === "beyond" ? "after the survey" : `survey section ${survey}`;
      const kinds = (wanted) => rooms.filter(([, there]) => there === wanted).map(([room]) => room).join(", ");
      const limit = limits.map(([name, when]) => `it is ${byName[name]?.title ?? name} when ${when}`);
      return [`${title}: ${family}, ${where}`, kinds(true) && `has ${kinds(true)}`, kinds(false) && `not yet: ${kinds(false)}`, ...limit,
        target(method).href ? "open it to read its chapter" : page ? "the book has its chapter" : "no chapter yet"].filter(Boolean).join("; ") + ".";
    }

    function drawLines() {
      const frame = map.getBoundingClientRect(), shown = stage.get("shown");
      lines.replaceChildren();
      if (!stage.get("lines") || !frame.width) return;
      for (const method of methods) {
        for (const [other] of method.limits.filter(([name]) => pills[name])) {
          const [a, b] = [pills[method.name], pills[other]].map((node) => {
            const box = node.getBoundingClientRect();
            return [box.x + box.width / 2 - frame.x, box.y - frame.y, box.height];
          });
          const strong = [method.name, other].includes(shown), up = a[1] > b[1] + 4;
          const from = up ? a[1] : a[1] + a[2], to = up ? b[1] + b[2] : b[1] + (a[1] < b[1] - 4 ? 0 : b[2]);
          const bend = Math.max(14, Math.abs(to - from) / 2) * (up ? -1 : 1), back = a[1] < b[1] - 4 || up ? -bend : bend;
          lines.append(svgElement("path", {
            d: `M${a[0]} ${from}C${a[0]} ${from + bend} ${b[0]} ${to + back} ${b[0]} ${to}`, fill: "none", stroke: familyColor(method.family),
            "stroke-width": strong ? 3 : 1.5, "stroke-opacity": strong ? 1 : 0.55,
          }), svgElement("circle", { cx: b[0], cy: to, r: strong ? 4 : 3, fill: familyColor(method.family) }));
        }
      }
    }

    stage.draw(() => {
      for (const method of methods) {
        pills[method.name].classList.toggle("shown", method.name === stage.get("shown"));
        pills[method.name].classList.toggle("hidden", !matches(method));
      }
      drawLines();
    });
    const watch = new ResizeObserver(drawLines);
    watch.observe(map);
    stage.undo.push(() => watch.disconnect());
    return stage.cleanup;
  },
};
