// The confusion matrix as a heat map: all classes, the most confused ones, or a part that was zoomed into.
// A cell's shade is its share of the row's images. With more than LEGIBLE classes, a dot covers a block of cells.

function matrix() {
  const figure = $('matrix');
  if (!figure) return;
  const LEGIBLE = 32, FOCUS = 24, DOT = 3;
  const box = figure.querySelector('.plot-box');
  const K = classes.length;
  const view = { kind: 'all', order: 'given', zoomed: null, row: 0, col: 0 };
  let drawn = null;

  // Put classes that are often confused next to each other: lists that share the largest cells are joined.
  function byConfusion(cells, ids) {
    const lists = new Map(ids.map((id) => [id, [id]]));
    for (let i = 0; i < cells.length; i += 3) {
      const [a, b] = [lists.get(cells[i]), lists.get(cells[i + 1])];
      if (!a || !b || a === b) continue;
      const [large, small] = a.length < b.length ? [b, a] : [a, b];
      large.push(...small);
      small.forEach((id) => lists.set(id, large));
    }
    return [...new Set(lists.values())].sort((a, b) => b.length - a.length).flat();
  }

  function prepared() {
    const model = data.models[state.model];
    if (!model.counts) {
      const { cells } = model;
      model.counts = new Map();
      model.confused = new Set();
      for (let i = 0; i < cells.length; i += 3) {
        model.counts.set(cells[i] * K + cells[i + 1], cells[i + 2]);
        if (model.confused.size < FOCUS) model.confused.add(cells[i]).add(cells[i + 1]);
      }
      model.given = classes.map((_, id) => id);
      model.similar = byConfusion(cells, model.given);
    }
    return model;
  }

  function ids(model) {
    const all = model[view.order];
    if (view.kind === 'confused') return all.filter((id) => model.confused.has(id));
    return view.kind === 'zoomed' ? view.zoomed : all;
  }

  const count = (model, row, col) => (row === col ? model.right[row] : model.counts.get(row * K + col) ?? 0);
  const mistakeShade = (share) => 0.1 + 0.85 * Math.sqrt(share);

  function switches(model) {
    const views = [['all', `all ${number(K)}`]];
    if (K > LEGIBLE && model.confused.size) views.push(['confused', 'most confused']);
    if (view.kind === 'zoomed') views.push(['zoomed', 'zoomed in']);
    fillSwitch($('matrix-view'), 'matrix-view', views, view.kind, (kind) => { view.kind = kind; home(); });
    const orders = K > 2 && view.kind !== 'zoomed' ? [['given', 'as given'], ['similar', 'confused ones together']] : [];
    fillSwitch($('matrix-order'), 'matrix-order', orders, view.order, (kind) => { view.order = kind; home(); });
  }

  function home() {
    Object.assign(view, { row: 0, col: 0 });
    draw();
  }

  function draw() {
    const model = prepared();
    const list = ids(model);
    const width = Math.max(240, Math.min(760, box.clientWidth || 720));
    switches(model);
    drawn = list.length > LEGIBLE ? dots(model, list, width) : squares(model, list, width);
    const { svg } = drawn;
    svg.addEventListener('keydown', moved);
    svg.addEventListener('pointermove', pointed);
    svg.addEventListener('click', (event) => { pointed(event); opened(); });
    svg.addEventListener('focus', () => look(view.row, view.col));
    const hadFocus = box.contains(document.activeElement);
    box.replaceChildren(svg);
    $('matrix-readout').textContent = `${drawn.hint} Or focus the map, use the arrow keys, and Enter.`;
    $('matrix-samples').replaceChildren();
    if (hadFocus) svg.focus({ preventScroll: true });
    const hidden = model.hidden ? ` ${many(model.hidden, 'mistake')} in the rarest cells are left out of the map.` : '';
    $('matrix-note').textContent = drawn.note + hidden;
  }

  function frame(width, height) {
    const label = `Confusion matrix of ${state.model}. Rows are labels, columns answers. Arrow keys move, Enter opens.`;
    return make('svg', { class: 'plot', viewBox: `0 0 ${width} ${height}`, role: 'application', tabindex: '0', 'aria-label': label, 'aria-describedby': 'matrix-readout' });
  }

  // Few classes: a square for each cell, with its count if there is room.
  function squares(model, list, width) {
    const longest = Math.max(...list.map((id) => classes[id].length));
    const gutter = Math.min(Math.max(24, 7 * longest + 10), width * 0.26);
    const size = Math.min((width - gutter - 4) / list.length, 60);
    const top = gutter + 18;
    const svg = frame(width, top + size * list.length + 4);
    const room = Math.floor((gutter - 8) / 6.6);
    const font = `font-size: ${Math.min(12, Math.max(7, size - 1))}px`;
    svg.append(make('text', { x: gutter, y: 11, class: 'axis-name' }, 'answer →'), make('text', { x: 0, y: top - 7, class: 'axis-name' }, 'label ↓'));
    list.forEach((row, r) => {
      const y = top + r * size;
      svg.append(make('text', { x: gutter - 6, y: y + size / 2 + 4, 'text-anchor': 'end', style: font }, cut(classes[row], room)));
      const x = gutter + r * size + size / 2 + 4;
      svg.append(make('text', { transform: `translate(${x} ${top - 6}) rotate(-90)`, style: font }, cut(classes[row], room)));
      list.forEach((col, c) => svg.append(...square(model, row, col, gutter + c * size, y, size)));
    });
    const hint = 'Point at a cell.';
    const note = size < 20 ? 'Orange cells are mistakes, deeper for a larger share; blue ones are right.' : 'Orange cells are mistakes, deeper for a larger share; blue ones are right. Numbers are images.';
    return { svg, list, size, left: gutter, top, block: 1, hint, note };
  }

  function square(model, row, col, x, y, size) {
    const images = count(model, row, col);
    const share = model.support[row] ? images / model.support[row] : 0;
    const shade = row === col ? 0.12 + 0.75 * share : mistakeShade(share);
    const place = { x: x + 0.5, y: y + 0.5, width: size - 1, height: size - 1 };
    const parts = [make('rect', { ...place, class: 'ground' })];
    if (!images) return parts;
    parts.push(make('rect', { ...place, class: row === col ? 'right' : 'wrong', 'fill-opacity': shade.toFixed(3) }));
    if (size >= 20) {
      const kind = shade > 0.55 ? 'count inverse' : 'count';
      parts.push(make('text', { x: x + size / 2, y: y + size / 2 + 4, 'text-anchor': 'middle', class: kind }, number(images)));
    }
    return parts;
  }

  // Many classes: a dot for each block of cells, on a canvas inside the figure.
  function dots(model, list, width) {
    const left = 40, top = 24, room = width - left - 2;
    const block = Math.ceil(list.length / Math.floor(room / DOT));
    const num = Math.ceil(list.length / block);
    const side = num * Math.floor(room / num);
    const place = new Map(list.map((id, position) => [id, Math.floor(position / block)]));
    const images = new Float64Array(num * num), rows = new Float64Array(num);
    list.forEach((id) => { rows[place.get(id)] += model.support[id]; });
    for (let i = 0; i < model.cells.length; i += 3) {
      const [row, col] = [place.get(model.cells[i]), place.get(model.cells[i + 1])];
      if (row !== undefined && col !== undefined) images[row * num + col] += model.cells[i + 2];
    }
    const svg = frame(width, top + side + 20);
    svg.append(make('rect', { x: left, y: top, width: side, height: side, class: 'ground' }));
    svg.append(make('line', { x1: left, y1: top, x2: left + side, y2: top + side, class: 'line0', 'stroke-opacity': 0.35 }));
    svg.append(make('image', { href: raster(images, rows, num), x: left, y: top, width: side, height: side, style: 'image-rendering: pixelated' }));
    svg.append(make('text', { x: left, y: 13, class: 'axis-name' }, 'answer →'));
    svg.append(make('text', { transform: `translate(12 ${top + 70}) rotate(-90)`, class: 'axis-name' }, '← label'));
    const step = [50, 100, 200, 500, 1000, 2000, 5000, 10000].find((value) => list.length / value <= 10) ?? 20000;
    for (let tick = step; tick < list.length; tick += step) {
      const at = (tick / block / num) * side;
      svg.append(make('text', { x: left - 5, y: top + at + 4, class: 'tick', 'text-anchor': 'end' }, number(tick)));
      svg.append(make('text', { x: left + at, y: top + side + 15, class: 'tick', 'text-anchor': 'middle' }, number(tick)));
    }
    const hint = 'Click on a place to zoom into its classes.';
    const note = `Every dot is a mistake; ${block > 1 ? `a dot covers ${block} × ${block} cells, ` : ''}deeper for a larger share of the label’s images.`;
    return { svg, list, size: side / num, left, top, block, num, images, hint, note };
  }

  function raster(images, rows, num) {
    const colour = getComputedStyle(document.documentElement).getPropertyValue('--wrong').trim();
    const channels = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
    const canvas = make('canvas', { width: num, height: num });
    const context = canvas.getContext('2d');
    const pixels = context.createImageData(num, num);
    images.forEach((value, at) => {
      const share = value / Math.max(rows[Math.floor(at / num)], 1);
      if (value) pixels.data.set([...channels, Math.round(255 * Math.min(1, 0.22 + 1.4 * Math.sqrt(share)))], 4 * at);
    });
    context.putImageData(pixels, 0, 0);
    return canvas.toDataURL();
  }

  const cellsAcross = () => (drawn.block > 1 || drawn.num ? drawn.num : drawn.list.length);

  function pointed(event) {
    const { svg, left, top, size } = drawn;
    const bounds = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / bounds.width;
    const col = Math.floor(((event.clientX - bounds.left) * scale - left) / size);
    const row = Math.floor(((event.clientY - bounds.top) * scale - top) / size);
    if (row >= 0 && col >= 0 && row < cellsAcross() && col < cellsAcross()) look(row, col);
  }

  function moved(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === 'Enter' || event.key === ' ') {
      event.preventDefault();
      opened();
    } else if (steps[event.key]) {
      event.preventDefault();
      const [down, right] = steps[event.key];
      const last = cellsAcross() - 1;
      look(Math.min(last, Math.max(0, view.row + down)), Math.min(last, Math.max(0, view.col + right)));
    }
  }

  function look(row, col) {
    Object.assign(view, { row, col });
    const { svg, left, top, size } = drawn;
    svg.querySelectorAll('.cursor').forEach((element) => element.remove());
    const place = { x: left + col * size, y: top + row * size, width: Math.max(size, 3), height: Math.max(size, 3) };
    svg.append(make('rect', { ...place, class: 'cursor under' }), make('rect', { ...place, class: 'cursor' }));
    $('matrix-readout').replaceChildren(...(drawn.num ? tellBlock(row, col) : tellCell(drawn.list[row], drawn.list[col])));
  }

  function tellCell(row, col) {
    const model = prepared();
    const images = count(model, row, col), all = model.support[row];
    const what = row === col ? ['Label ', bold(classes[row]), ', answered rightly'] : ['Label ', bold(classes[row]), ', answer ', bold(classes[col])];
    return [...what, `: ${number(images)} of ${many(all, 'image')}${all ? ` (${percent(images / all)})` : ''}.`];
  }

  const span = (list) => (list.length === 1 ? classes[list[0]] : `${classes[list[0]]} … ${classes[list.at(-1)]}`);
  const inBlock = (position) => drawn.list.slice(position * drawn.block, (position + 1) * drawn.block);

  function tellBlock(row, col) {
    const [rows, cols] = [inBlock(row), inBlock(col)];
    const model = prepared();
    let most = [0, 0, 0];
    for (const r of rows) for (const c of cols) if (r !== c && count(model, r, c) > most[0]) most = [count(model, r, c), r, c];
    const total = drawn.images[row * drawn.num + col];
    const parts = ['Label ', bold(span(rows)), ', answer ', bold(span(cols)), `: ${many(total, 'mistake')}.`];
    return most[0] && drawn.block > 1 ? [...parts, ` Most: ${classes[most[1]]} taken for ${classes[most[2]]} (${number(most[0])}).`] : parts;
  }

  // Show a cell's pictures; with many classes, zoom into those around it.
  function opened() {
    if (!drawn.num) {
      const [row, col] = [drawn.list[view.row], drawn.list[view.col]];
      const pair = data.pairs[state.model].find(([truth, pred]) => truth === row && pred === col);
      const none = row === col || !count(prepared(), row, col) ? [] : [make('p', { class: 'muted' }, 'Only the most confused pairs have pictures; see below.')];
      $('matrix-samples').replaceChildren(...(pair ? [pairRow(pair)] : none));
      return;
    }
    const half = FOCUS / 2;
    const around = (position) => {
      const start = Math.max(0, Math.min(drawn.list.length - half, Math.floor((position + 0.5) * drawn.block - half / 2)));
      return drawn.list.slice(start, start + half);
    };
    view.zoomed = [...new Set([...around(view.row), ...around(view.col)])];
    view.kind = 'zoomed';
    home();
    drawn.svg.focus({ preventScroll: true });
    say(`Zoomed into ${many(view.zoomed.length, 'class')}.`);
  }

  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(box.clientWidth - width) > 8) { width = box.clientWidth; draw(); }
  }).observe(box);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  state.listeners.push(() => { if (view.kind === 'zoomed') view.kind = 'all'; draw(); });
  draw();
}

matrix();
