// Shared by the other scripts: data, elements, numbers, the choice of a model, saving of figures and tables.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read('data');
const { classes, order } = data;
const state = { model: order[0], listeners: [] };
const $ = (id) => document.getElementById(id);

// Text becomes text nodes and attributes only, so no name can become markup.
function make(tag, attributes = {}, ...children) {
  const svg = ['svg', 'g', 'rect', 'line', 'text', 'image', 'title', 'tspan', 'path'].includes(tag);
  const element = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const number = (value) => value.toLocaleString('en-US');
const percent = (value, digits = 1) => (value === null || value === undefined ? '–' : `${(100 * value).toFixed(digits)}%`);
const many = (count, noun) => `${number(count)} ${noun}${count === 1 ? '' : noun.endsWith('s') ? 'es' : 's'}`;
const cut = (text, length) => (text.length > length ? `${text.slice(0, Math.max(1, length - 1))}…` : text);
const bold = (text) => make('b', {}, text);

function say(text) { $('live').textContent = text; }

// Radio buttons that look like a switch. `choices` are [value, text]; `picked` is called with the value.
function fillSwitch(fieldset, name, choices, current, picked) {
  fieldset.querySelectorAll('label').forEach((label) => label.remove());
  fieldset.hidden = choices.length < 2;
  for (const [value, text] of choices) {
    const input = make('input', { type: 'radio', name, value, checked: value === current, onchange: () => picked(value) });
    fieldset.append(make('label', {}, input, make('span', {}, text)));
  }
}

function chooseModel(name) {
  state.model = name;
  document.querySelectorAll('.models-switch input').forEach((input) => { input.checked = input.value === name; });
  state.listeners.forEach((listener) => listener());
}

document.querySelectorAll('.models-switch').forEach((fieldset, index) => {
  fillSwitch(fieldset, `model-${index}`, order.map((name) => [name, name]), state.model, chooseModel);
});

function download(name, blob) {
  const link = make('a', { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`${name} saved`);
}

function saveCsv(name, rows) {
  const cell = (value) => (/[",\r\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const lines = rows.map((row) => row.map((value) => cell(value ?? '')).join(','));
  download(name, new Blob([`${lines.join('\n')}\n`], { type: 'text/csv' }));
}

// The figure as shown, with its colours written out, so that it looks the same in other programs.
function svgText(svg) {
  const colours = getComputedStyle(document.documentElement);
  const value = (name) => colours.getPropertyValue(name).trim();
  const style = read('figure-style').replace(/var\((--[\w-]+)\)/g, (_, name) => value(name));
  const copy = svg.cloneNode(true);
  const [, , width, height] = copy.getAttribute('viewBox').split(' ');
  copy.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  copy.setAttribute('width', width);
  copy.setAttribute('height', height);
  copy.querySelectorAll('.cursor').forEach((element) => element.remove());
  copy.prepend(make('rect', { width, height, fill: value('--paper') }));
  const sheet = document.createElementNS('http://www.w3.org/2000/svg', 'style');
  sheet.textContent = style;
  copy.prepend(sheet);
  return new XMLSerializer().serializeToString(copy);
}

function saveSvg(name, svg) {
  download(`${name}.svg`, new Blob([svgText(svg)], { type: 'image/svg+xml' }));
}

function savePng(name, svg) {
  const [, , width, height] = svg.getAttribute('viewBox').split(' ').map(Number);
  const image = new Image();
  image.addEventListener('load', () => {
    const canvas = make('canvas', { width: Math.round(2 * width), height: Math.round(2 * height) });
    canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => download(`${name}.png`, blob));
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText(svg))}`;
}

document.querySelectorAll('figure[data-save]').forEach((figure) => {
  const name = () => (figure.id === 'matrix' ? `confusion-${state.model}` : figure.dataset.save);
  const shown = () => figure.querySelector('svg.plot:not(.key)');
  const buttons = make('span', { class: 'saves' });
  for (const [kind, save] of [['SVG', saveSvg], ['PNG', savePng]]) {
    const label = `Save the figure ${figure.dataset.save} as ${kind}`;
    buttons.append(make('button', { type: 'button', 'aria-label': label, onclick: () => save(name(), shown()) }, kind));
  }
  const caption = figure.querySelector('figcaption');
  caption.insertBefore(buttons, caption.querySelector('details'));
});
