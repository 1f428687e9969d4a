
"use strict";
// Draws what the page holds as JSON. Every text reaches the page as textContent.
{
const data = JSON.parse(document.getElementById("data").textContent);
const LEFT = 96, LEAST = 8;
const number = n => n.toLocaleString("en-US");
const many = (n, what) => `${number(n)} ${what}${n === 1 ? "" : "s"}`;
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const colours = new Map(); // of the style, asked once each
const colour = name => {
  if (!colours.has(name)) {
    colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  }
  return colours.get(name);
};
const idOf = id => id === null ? "not named" : String(id);
const sequences = ([n, ...ids]) => {
  if (!n) return "of no sequence";
  const more = n > ids.length ? ` and ${n - ids.length} more` : "";
  return `${n === 1 ? "sequence" : "sequences"} ${ids.map(idOf).join(", ")}${more}`;
};
const hue = id => (0.58 + (id ?? 0) * 0.618034) % 1 * 360;
const paintOf = id => `hsl(${hue(id).toFixed(1)} 60% ${colour("--light")})`;
const paler = (id, share) => `hsl(${hue(id).toFixed(1)} 60% ${colour("--light")} / ${share.toFixed(2)})`;
const span = (first, last) => first === last ? number(first) : `${number(first)}–${number(last)}`;

// A picture on a grid of columns and lines, of which a part is seen. A model has: width, height,
// line (pixels of a line), zoomY, paint(g, view), tell(x, y), and the names of columns and lines.
class Picture {
  constructor(figure, model) {
    this.model = model;
    this.canvas = figure.querySelector("canvas");
    this.output = figure.querySelector("output");
    this.hint = this.output.textContent;
    this.mark = null;
    this.whole();
    for (const button of figure.querySelectorAll("button")) {
      button.addEventListener("click", () => this.act(button.dataset.act));
    }
    this.canvas.addEventListener("pointermove", event => this.moved(event));
    this.canvas.addEventListener("pointerdown", event => this.grabbed(event));
    this.canvas.addEventListener("pointerleave", () => this.told(null));
    this.canvas.addEventListener("keydown", event => this.pressed(event));
    this.canvas.addEventListener("wheel", event => this.turned(event), {passive: false});
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  whole() {
    this.x0 = 0; this.x1 = this.model.width;
    this.y0 = 0; this.y1 = this.model.height;
  }

  get inner() { return this.canvas.clientWidth - LEFT - 8; }
  get high() { return this.canvas.clientHeight - this.bottom; }
  get bottom() { return this.model.columnName ? 24 : 6; }
  toX(x) { return LEFT + (x - this.x0) / (this.x1 - this.x0) * this.inner; }
  toY(y) { return (y - this.y0) / (this.y1 - this.y0) * this.high; }

  draw() {
    const {canvas, model} = this, scale = window.devicePixelRatio || 1;
    if (this.canvas.clientWidth <= LEFT + 8) return; // it is not seen
    const height = clamp(model.height * model.line, 18, 640) + this.bottom;
    canvas.style.height = `${height}px`;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale));
    canvas.height = Math.round(height * scale);
    const g = canvas.getContext("2d");
    g.scale(scale, scale);
    g.save();
    g.beginPath();
    g.rect(LEFT, 0, this.inner, this.high);
    g.clip();
    model.paint(g, this);
    if (this.mark) this.frame(g, ...this.mark);
    g.restore();
    this.axes(g);
  }

  frame(g, x, y) {
    const left = this.toX(x), top = this.toY(y);
    g.lineWidth = 2;
    g.strokeStyle = colour("--text");
    g.strokeRect(left - 1, top, Math.max(this.toX(x + 1) - left, 2) + 2, this.toY(y + 1) - top);
  }

  axes(g) {
    const {model} = this;
    g.font = "12px system-ui, sans-serif";
    g.fillStyle = colour("--text");
    g.textBaseline = "middle";
    g.textAlign = "right";
    const skip = Math.max(1, Math.ceil(14 / (this.high / (this.y1 - this.y0))));
    for (let y = Math.ceil(this.y0 / skip) * skip; y < this.y1; y += skip) {
      g.fillText(model.lineName(y), LEFT - 6, this.toY(y + 0.5), LEFT - 8);
    }
    g.textAlign = "center";
    if (!model.columnName) return;
    const step = niceStep((this.x1 - this.x0) / (this.inner / 90));
    for (let x = Math.ceil((this.x0 + model.origin) / step) * step - model.origin; x < this.x1; x += step) {
      g.fillText(model.columnName(x), clamp(this.toX(x + 0.5), LEFT + 12, LEFT + this.inner - 12), this.high + 12);
    }
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const px = event.clientX - box.left - LEFT, py = event.clientY - box.top;
    if (px < 0 || px >= this.inner || py < 0 || py >= this.high) return null;
    return [
      this.x0 + px / this.inner * (this.x1 - this.x0),
      this.y0 + py / this.high * (this.y1 - this.y0),
    ];
  }

  told(place) {
    this.mark = place && place.map(Math.floor);
    this.output.textContent = this.mark ? this.model.tell(...this.mark) : this.hint;
    this.draw();
  }

  moved(event) {
    if (this.grip && event.buttons) {
      const wide = this.grip.x1 - this.grip.x0, tall = this.grip.y1 - this.grip.y0;
      const dx = (this.grip.x - event.clientX) / this.inner * wide;
      const dy = (this.grip.y - event.clientY) / this.high * tall;
      this.show(this.grip.x0 + dx, wide, this.grip.y0 + dy, tall);
    }
    this.told(this.at(event));
  }

  grabbed(event) {
    this.grip = {x: event.clientX, y: event.clientY, x0: this.x0, x1: this.x1, y0: this.y0, y1: this.y1};
    this.canvas.setPointerCapture(event.pointerId);
  }

  show(x0, wide, y0, tall) {
    const {width, height} = this.model;
    wide = clamp(wide, Math.min(LEAST, width), width);
    tall = clamp(tall, Math.min(LEAST, height), height);
    this.x0 = clamp(x0, 0, width - wide);
    this.x1 = this.x0 + wide;
    this.y0 = clamp(y0, 0, height - tall);
    this.y1 = this.y0 + tall;
  }

  zoom(factor, x, y) {
    const wide = (this.x1 - this.x0) * factor;
    const tall = (this.y1 - this.y0) * (this.model.zoomY ? factor : 1);
    const fx = (x - this.x0) / (this.x1 - this.x0), fy = (y - this.y0) / (this.y1 - this.y0);
    const least = Math.min(LEAST, this.model.width);
    this.show(x - fx * Math.max(wide, least), wide, y - fy * tall, tall);
    this.draw();
  }

  act(what) {
    const [x, y] = this.mark ?? [(this.x0 + this.x1) / 2, (this.y0 + this.y1) / 2];
    if (what === "in") this.zoom(0.5, x, y);
    else if (what === "out") this.zoom(2, x, y);
    else { this.whole(); this.draw(); }
  }

  turned(event) {
    const place = this.at(event);
    if (!place || !(event.ctrlKey || document.activeElement === this.canvas)) return;
    event.preventDefault();
    this.zoom(Math.exp(clamp(event.deltaY, -200, 200) / 300), ...place);
  }

  pressed(event) {
    const acts = {"+": "in", "=": "in", "-": "out", "0": "all"};
    const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in acts) this.act(acts[event.key]);
    else if (event.key in steps) this.step(...steps[event.key]);
    else if (event.key === "Escape") this.told(null);
    else return;
    event.preventDefault();
  }

  step(dx, dy) {
    const {width, height} = this.model;
    const [x, y] = this.mark
      ? [this.mark[0] + dx, this.mark[1] + dy]
      : [Math.floor(this.x0), Math.floor(this.y0)];
    const to = [clamp(x, 0, width - 1), clamp(y, 0, height - 1)];
    const wide = this.x1 - this.x0, tall = this.y1 - this.y0;
    const x0 = to[0] < this.x0 ? to[0] : to[0] + 1 > this.x1 ? to[0] + 1 - wide : this.x0;
    const y0 = to[1] < this.y0 ? to[1] : to[1] + 1 > this.y1 ? to[1] + 1 - tall : this.y0;
    this.show(x0, wide, y0, tall);
    this.told(to);
  }
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(least, 1)));
  return [1, 2, 5, 10].map(n => n * power).find(n => n >= least) ?? 10 * power;
}

// The runs of a stream are five numbers each: cell, cells, lowest position, highest, owners.
function* runsOf(stream) {
  for (let i = 0; i < stream.runs.length; i += 5) yield stream.runs.slice(i, i + 5);
}

function inStream(cache, stream) {
  return cache.n_stream > 1 ? ` of stream ${stream.index}` : "";
}

// Sequences down, positions to the right.
function positions(cache) {
  const held = cache.sequences;
  let low = Infinity, high = 0;
  for (const {runs} of held) {
    for (let i = 0; i < runs.length; i += 2) {
      low = Math.min(low, runs[i]);
      high = Math.max(high, runs[i + 1]);
    }
  }
  // What is listed as a block, or with more owners than are named, may hold it or not.
  const where = (id, position) => {
    const sure = [], perhaps = [];
    let complete = true;
    for (const stream of cache.streams) {
      for (const run of runsOf(stream)) {
        const [cell, n, first, last, own] = run, owners = cache.owners[own];
        const named = owners.indexOf(id, 1) > 0, cut = owners[0] >= owners.length;
        complete = complete && stream.exact && !cut;
        if (position < first || position > last || !(named || cut)) continue;
        const at = stream.exact ? number(cell + position - first) : span(cell, cell + n - 1);
        const with_ = stream.exact && owners[0] > 1 ? `, shared: ${sequences(owners)}` : "";
        const text = `${at}${inStream(cache, stream)}${with_}`;
        if (stream.exact && named) sure.push(`cell ${text}`);
        else perhaps.push(stream.exact ? `cell ${text}` : `among cells ${text}`);
      }
    }
    if (sure.length > 3) return `${sure.slice(0, 3).join("; ")}; and ${many(sure.length - 3, "more cell")}`;
    if (sure.length) return sure.join("; ");
    if (complete) return "not there";
    if (cache.closed) return `there, or in a hole of up to ${many(cache.closed, "position")}`;
    return perhaps.length === 1 ? perhaps[0] : "there, in a cell that is not listed";
  };
  return {
    width: high - low + 1, height: held.length, line: 26, zoomY: false, origin: low,
    lineName: y => held[y].id === null ? "not named" : `sequence ${held[y].id}`,
    columnName: x => number(low + x),
    paint(g, view) {
      held.forEach(({id, runs}, y) => {
        g.fillStyle = paintOf(id);
        const top = view.toY(y + 0.12), tall = view.toY(y + 0.88) - top;
        for (let i = 0; i < runs.length; i += 2) {
          const left = view.toX(runs[i] - low), right = view.toX(runs[i + 1] - low + 1);
          if (right >= LEFT && left <= LEFT + view.inner) g.fillRect(left, top, Math.max(right - left, 1), tall);
        }
      });
    },
    tell(x, y) {
      const {id, runs} = held[y], position = low + x;
      const name = `${id === null ? "sequence not named" : `sequence ${id}`}, position ${number(position)}: `;
      for (let i = 0; i < runs.length; i += 2) {
        if (runs[i] <= position && position <= runs[i + 1]) return name + where(id, position);
      }
      return name + "not there";
    },
  };
}

// The cells of all streams in their order, line by line; a square is one cell or several.
function cells(cache) {
  const total = cache.streams.reduce((sum, stream) => sum + stream.cells, 0);
  const per = cache.per;
  const columns = Math.max(8, Math.ceil(Math.sqrt(3 * total / per)));
  const lines = [];
  let high = 1;
  for (const stream of cache.streams) {
    const runs = [...runsOf(stream)];
    for (const run of runs) high = Math.max(high, run[3]);
    for (let cell = 0; cell < stream.cells; cell += columns * per) lines.push({stream, runs, cell});
  }
  const findRun = (runs, cell) => {
    let low = 0, top = runs.length - 1;
    while (low < top) {
      const middle = (low + top + 1) >> 1;
      if (runs[middle][0] <= cell) low = middle; else top = middle - 1;
    }
    return low;
  };
  return {
    width: columns, height: lines.length, line: 14, zoomY: true,
    lineName(y) {
      const {stream, cell} = lines[y];
      return cache.n_stream > 1 && cell === 0 ? `stream ${stream.index}` : `cell ${number(cell)}`;
    },
    paint(g, view) {
      for (let y = Math.floor(view.y0); y < Math.min(view.y1, lines.length); y++) {
        const {stream, runs, cell} = lines[y];
        for (let x = Math.floor(view.x0); x < Math.min(view.x1, columns); x++) {
          const at = cell + x * per;
          if (at >= stream.cells) break;
          const run = runs[findRun(runs, at)], owners = cache.owners[run[4]].slice(1);
          const share = 0.35 + 0.65 * (stream.exact ? run[2] + at - run[0] : run[2]) / high;
          const left = view.toX(x) + 0.5, wide = view.toX(x + 1) - left - 0.5;
          const top = view.toY(y) + 0.5, tall = view.toY(y + 1) - top - 0.5;
          if (!owners.length) { g.fillStyle = colour("--quiet"); g.fillRect(left, top, wide, tall); }
          owners.forEach((id, i) => {
            g.fillStyle = paler(id, share);
            g.fillRect(left, top + i * tall / owners.length, wide, tall / owners.length);
          });
        }
      }
    },
    tell(x, y) {
      const {stream, runs, cell} = lines[y], at = cell + x * per;
      if (at >= stream.cells) return "no cell";
      const end = Math.min(at + per, stream.cells) - 1;
      const parts = [];
      for (let i = findRun(runs, at); i < runs.length && runs[i][0] <= end && parts.length < 4; i++) {
        const [first, n, low, top, own] = runs[i];
        const from = stream.exact ? low + Math.max(at - first, 0) : low;
        const to = stream.exact ? low + Math.min(end - first, n - 1) : top;
        const block = stream.exact ? "" : `among cells ${span(first, first + n - 1)}: `;
        parts.push(`${block}position ${span(from, to)}, ${sequences(cache.owners[own])}`);
      }
      return `cell ${span(at, end)}${inStream(cache, stream)}: ${parts.join("; ")}`;
    },
  };
}

const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
];

function shadeOf(percent) {
  if (percent === null) return colour("--none");
  if (percent < 0) return "cyan";
  if (percent > 100) return "red";
  const at = percent / 100 * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const mix = VIRIDIS[low].map((c, i) => Math.round(c + (VIRIDIS[low + 1][i] - c) * (at - low)));
  return `rgb(${mix.join(" ")})`;
}

// Layers down, positions to the right.
function heat(map) {
  const columns = map.edges.length - 1, layer = map.of_model ? "layer" : "layer of the cache";
  const limit = x => map.edges[x];
  return {
    width: columns, height: map.layers.length, line: 18, zoomY: false, origin: 0,
    lineName: y => `layer ${map.layers[y]}`,
    columnName: x => number(limit(x)),
    paint(g, view) {
      const shades = new Map();
      map.shade.forEach((line, y) => line.forEach((percent, x) => {
        if (!shades.has(percent)) shades.set(percent, shadeOf(percent));
        g.fillStyle = shades.get(percent);
        const left = Math.floor(view.toX(x)), top = Math.floor(view.toY(y));
        g.fillRect(left, top, Math.ceil(view.toX(x + 1)) - left, Math.ceil(view.toY(y + 1)) - top);
      }));
    },
    tell(x, y) {
      const value = map.rms[y][x], shade = map.shade[y][x];
      const far = shade === null ? "" : shade < 0 ? ", far below the rest" : shade > 100 ? ", far above the rest" : "";
      const said = value === null ? "no rows, or not a number" : `RMS ${value}${far}`;
      const place = `${map.axis} ${span(limit(x), Math.max(limit(x), limit(x + 1) - 1))}`;
      return `${layer} ${map.layers[y]}, ${place}: ${said}`;
    },
  };
}

document.getElementById("pictures").hidden = false;
const pictures = [];
const models = {positions: i => positions(data.cells[i]), cells: i => cells(data.cells[i]), heat: i => heat(data.heats[i])};
for (const figure of document.querySelectorAll("figure")) {
  pictures.push(new Picture(figure, models[figure.dataset.kind](Number(figure.dataset.index))));
}
for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", () => {
    colours.clear();
    pictures.forEach(picture => picture.draw());
  });
}
}
