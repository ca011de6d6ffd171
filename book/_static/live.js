// Live cells: edit a NumPy cell of the page and run it here, in a Python that loads when Run is first pressed.
// Set window.EFFATTN_PYODIDE to take Pyodide from another place than its own network.
"use strict";

(() => {
  const STATIC = new URL(".", document.currentScript.src).href;
  const PYODIDE = window.EFFATTN_PYODIDE ?? "https://cdn.jsdelivr.net/pyodide/v0.27.7/full/";
  const KEYS = "Shift+Enter runs the cell; Escape leaves the editor.";

  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") node.addEventListener(name, value);
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };

  // Python ------------------------------------------------------------------------------------------

  let worker = null, current = null, queue = Promise.resolve();

  function start() {
    worker = new Worker(new URL("live_worker.js", STATIC));
    worker.onmessage = ({ data }) => {
      if (data.type === "done") finish(data.ok);
      else if (data.type === "broken") stop();
      else if (data.type === "status") current?.say(data.words);
      else current?.show(data);
    };
    worker.onerror = (event) => {
      current?.show({ type: "error", words: event.message || "Python could not be loaded." });
      stop("Stopped: see the message below.");
    };
    worker.postMessage({ type: "start", pyodide: new URL(PYODIDE, document.baseURI).href, root: STATIC });
    current.say("Loading Python: about 12 MB, once …");
  }

  function finish(ok, words) {
    const done = current?.done;
    current = null;
    done?.(ok, words);
  }

  // nothing stops a running loop but the end of its worker: all cells have then to run again
  function stop(words) {
    worker?.terminate();
    worker = null;
    cells.forEach((cell) => { cell.ran = null; });
    finish(false, words);
  }

  function execute(cell) {
    return new Promise((resolve) => {
      const text = cell.text(), began = performance.now();
      cell.clear();
      cell.node.classList.add("live-running");
      cell.say("Running …");
      current = {
        say: cell.say, show: cell.show,
        done: (ok, words = "Stopped: see the message below.") => {
          cell.node.classList.remove("live-running");
          cell.ran = ok ? text : null;
          cell.say(ok ? `Done in ${((performance.now() - began) / 1000).toFixed(1)} s.` : words);
          resolve(ok);
        },
      };
      if (!worker) start();
      worker.postMessage({ type: "run", code: text, name: `<cell ${cell.number}>` });
    });
  }

  // this cell after all earlier ones whose text has not run yet; exercises and their solutions feed no other cell
  async function run(cell) {
    const needed = cells.filter((other) => other.number < cell.number && !other.leaf && other.ran !== other.text());
    cells.forEach((other) => other.busy(true));
    let ok = true;
    for (const other of [...needed, cell]) {
      if (other !== cell) cell.say(`Running cell ${other.number}, which comes before …`);
      ok = await execute(other);
      if (!ok) {
        if (other !== cell) cell.say(`Cell ${other.number}, which comes before, did not run: see there.`);
        break;
      }
    }
    cells.forEach((other) => other.busy(false));
    return ok;
  }

  // a cell ------------------------------------------------------------------------------------------

  class Cell {
    constructor(node, number) {
      this.node = node;
      this.number = number;
      this.ran = null;
      this.input = node.querySelector(".cell_input");
      this.original = this.input.querySelector("pre").textContent.replace(/\n$/, "");
      this.leaf = node.classList.contains("tag_exercise") || Boolean(node.closest(".solution"));
      this.editor = null;
      this.output = null;
      this.status = make("span", { class: "live-status", role: "status" });
      this.say = (words) => { this.status.textContent = words; };
      this.show = (item) => this.append(item);
      this.bar = make("div", { class: "live-bar" });
      this.input.after(this.bar);
      this.openButton = make("button", { type: "button", click: () => this.open(true) }, "Edit and run");
      this.openButton.setAttribute("aria-label", `Edit and run cell ${number}`);
      this.bar.append(this.openButton);
      if (node.classList.contains("tag_exercise")) this.open(false);
    }

    text() { return this.editor ? this.editor.value : this.original; }

    open(focus) {
      const hint = `live-keys-${this.number}`;
      this.editor = make("textarea", {
        class: "live-editor", spellcheck: "false", autocapitalize: "off", autocomplete: "off", wrap: "off",
        "aria-label": `Code of cell ${this.number}`, "aria-describedby": hint,
        input: () => this.fit(), keydown: (event) => this.key(event),
      });
      this.editor.value = this.original;
      this.input.hidden = true;
      this.input.after(this.editor);
      this.fit();
      this.runButton = make("button", { type: "button", class: "live-run", click: () => this.run() }, "Run");
      this.stopButton = make("button", { type: "button", disabled: "", click: () => stop("Stopped. The next run starts Python anew.") }, "Stop");
      const reset = make("button", { type: "button", click: () => this.reset() }, "Reset");
      this.bar.replaceChildren(this.runButton, this.stopButton, reset, this.status, make("span", { class: "live-keys", id: hint }, KEYS));
      if (focus) this.editor.focus();
    }

    run() {
      if (location.protocol === "file:") {
        this.say("A page opened from a file cannot load Python: see “How to run”.");
        return queue;
      }
      queue = queue.then(() => run(this));
      return queue;
    }

    reset() {
      this.editor.value = this.original;
      this.ran = null;
      this.fit();
      this.clear();
      this.output?.remove();
      this.output = null;
      this.node.classList.remove("live-ran");
      this.say("The cell is as it was.");
    }

    busy(on) {
      if (!this.editor) return;
      this.runButton.disabled = on;
      this.stopButton.disabled = !on;
    }

    fit() { this.editor.rows = Math.max(2, this.editor.value.split("\n").length); }

    key(event) {
      if (event.key === "Enter" && event.shiftKey) {
        event.preventDefault();
        this.run();
      } else if (event.key === "Escape") {
        this.runButton.focus();
      } else if (event.key === "Tab" && !event.shiftKey && !event.altKey && !event.ctrlKey) {
        event.preventDefault();
        document.execCommand("insertText", false, "    ");
      } else if (event.key === "Enter") {
        const line = this.editor.value.slice(0, this.editor.selectionStart).split("\n").pop();
        event.preventDefault();
        document.execCommand("insertText", false, `\n${line.match(/^ */)[0]}${/:\s*$/.test(line) ? "    " : ""}`);
      }
    }

    clear() {
      if (!this.output) {
        this.output = make("div", { class: "live-output", role: "region", "aria-live": "polite", "aria-label": `Output of cell ${this.number}` });
        this.node.append(this.output);
      }
      this.output.replaceChildren();
      this.node.classList.add("live-ran");
    }

    append({ type, words, html }) {
      if (type === "image") this.output.append(make("img", { src: `data:image/svg+xml;charset=utf-8,${encodeURIComponent(words)}`, alt: this.alt() }));
      else if (type === "html") this.output.append(alive(html));
      else if (type === "stream" && this.output.lastElementChild?.matches(".live-stream")) this.output.lastElementChild.append(words);
      else this.output.append(make("pre", { class: `live-${type}`, tabindex: "0" }, words));
    }

    // the figure that the page shows has words for it; an edited one most often shows the same thing
    alt() { return this.node.querySelector(".cell_output img")?.alt || `Figure drawn by cell ${this.number}`; }
  }

  // HTML whose scripts run, as in a page
  function alive(html) {
    const box = make("div", { class: "live-html" });
    box.innerHTML = html;
    for (const old of box.querySelectorAll("script")) {
      const script = make("script", Object.fromEntries([...old.attributes].map(({ name, value }) => [name, value])));
      script.textContent = old.textContent;
      old.replaceWith(script);
    }
    return box;
  }

  const cells = [];

  function prepare() {
    document.querySelectorAll("div.cell.tag_live").forEach((node) => {
      if (node.querySelector(".cell_input pre")) cells.push(new Cell(node, cells.length + 1));
    });
    // docutils calls a list what has no list items
    document.querySelectorAll(".citation-list[role=list]").forEach((node) => node.removeAttribute("role"));
    // what scrolls sideways can be reached by the keyboard
    document.querySelectorAll("div.highlight pre, div.math, .cell_output pre, .pst-scrollable-table-container").forEach((node) => {
      if (node.scrollWidth > node.clientWidth) node.tabIndex = 0;
    });
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", prepare);
  else prepare();
})();
