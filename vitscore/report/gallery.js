// Pictures of samples: most confused pairs, disagreements of two models, confident mistakes.

const TINY = 48;
const LABEL = 2, THUMB = 3, ANSWERS = 4;
const className = (id) => (id < 0 ? 'none' : classes[id]);

// A picture, or a box that says there is none. Small images keep sharp pixels.
function picture(sample) {
  const frame = make('div', { class: 'frame' });
  if (!sample[THUMB]) {
    frame.append('no picture');
    return frame;
  }
  const image = make('img', { alt: `image ${sample[0]}, label ${className(sample[LABEL])}` });
  image.addEventListener('load', () => image.classList.toggle('tiny', image.naturalWidth <= TINY && image.naturalHeight <= TINY));
  image.src = sample[THUMB];
  frame.append(image);
  return frame;
}

function shots(numbers, describe) {
  return make('ul', { class: 'shots' }, ...numbers.map((index) => {
    const sample = data.samples[index];
    return make('li', { class: 'shot', title: `${sample[0]} in ${sample[1]}` }, picture(sample), make('span', { class: 'key' }, sample[0]), describe(sample));
  }));
}

// `seven taken for nine: 3 of 50 images`, and its pictures.
function pairRow([truth, pred, count, support, numbers]) {
  const model = order.indexOf(state.model);
  const surest = (sample) => `${percent(sample[ANSWERS][model][1], 0)} sure`;
  const share = support ? ` (${percent(count / support)})` : '';
  const text = make('div', {}, make('p', {}, bold(classes[truth]), ' taken for ', bold(classes[pred])), make('p', { class: 'muted' }, `${number(count)} of ${many(support, 'image')}${share}`));
  return make('div', { class: 'pair-row' }, text, shots(numbers, surest));
}

function drawPairs() {
  const pairs = data.pairs[state.model];
  const none = make('p', { class: 'muted' }, `${state.model} confuses no classes.`);
  $('pairs').replaceChildren(...(pairs.length ? pairs.map(pairRow) : [none]));
}

function drawDisagreements() {
  for (const { a, b, only_a: onlyA, only_b: onlyB } of data.disagreements) {
    const places = [order.indexOf(a), order.indexOf(b)];
    const answered = (wrong) => (sample) => make('span', {}, bold(className(sample[LABEL])), ` not ${className(sample[ANSWERS][wrong][0])} (${percent(sample[ANSWERS][wrong][1], 0)})`);
    for (const [name, numbers, wrong] of [[a, onlyA, places[1]], [b, onlyB, places[0]]]) {
      if (!numbers.length) continue;
      const title = order.length > 2 ? `Only ${name} is right, and not ${order[wrong]}` : `Only ${name} is right`;
      $('disagreements').append(make('h3', {}, title), make('p', { class: 'muted' }, `The images on which both are most confident: the label, and the answer of ${order[wrong]}.`), shots(numbers, answered(wrong)));
    }
  }
}

function mistakes() {
  const STEP = 24;
  const ticked = new Set();
  let shown = STEP;

  function card([index, answer, confidence]) {
    const sample = data.samples[index];
    const said = sample[ANSWERS].map(([pred, prob], model) => make('p', { class: 'muted' }, `${order[model]}: ${className(pred)}${prob === null ? '' : `, ${percent(prob, 0)}`}`));
    const box = make('input', { type: 'checkbox', checked: ticked.has(index) });
    const body = make('div', { class: ticked.has(index) ? 'card ticked' : 'card' }, picture(sample), make('div', {}, make('p', {}, 'label ', bold(className(sample[LABEL])), ', answer ', bold(classes[answer])), ...said, make('label', {}, box, ' label is wrong')), make('p', { class: 'key', title: sample[1] }, sample[0]));
    box.setAttribute('aria-label', `the label of ${sample[0]} is wrong, ${classes[answer]} is right`);
    box.addEventListener('change', () => {
      ticked[box.checked ? 'add' : 'delete'](index);
      body.classList.toggle('ticked', box.checked);
      count();
    });
    return body;
  }

  function found() {
    const wanted = $('mistake-filter').value.trim().toLowerCase();
    const isAgreed = $('mistake-agreed').checked;
    return data.mistakes.filter(([index, answer]) => {
      const sample = data.samples[index];
      const text = `${sample[0]}\n${className(sample[LABEL])}\n${classes[answer]}`.toLowerCase();
      return text.includes(wanted) && (!isAgreed || sample[ANSWERS].every(([pred]) => pred === answer));
    });
  }

  function count() {
    const list = found();
    const ticks = ticked.size ? ` ${many(ticked.size, 'label')} ticked as wrong.` : '';
    $('mistake-count').textContent = `${number(Math.min(shown, list.length))} of ${many(list.length, 'image')}, the most confident first.${ticks}`;
    $('mistake-more').hidden = list.length <= shown;
  }

  function draw() {
    $('mistake-list').replaceChildren(...found().slice(0, shown).map(card));
    count();
  }

  function save() {
    const rows = data.mistakes.map(([index, answer, confidence]) => {
      const [key, shard, label] = data.samples[index];
      return [key, ticked.has(index) ? answer : '', shard, label, className(label), answer, classes[answer], confidence.toFixed(4)];
    });
    saveCsv('labels-to-correct.csv', [['key', 'label', 'shard', 'label_now', 'name_now', 'answer', 'answer_name', 'confidence'], ...rows]);
  }

  const again = () => { shown = STEP; draw(); };
  $('mistake-filter').addEventListener('input', again);
  $('mistake-agreed').addEventListener('change', again);
  $('mistake-agreed').closest('label').hidden = order.length < 2;
  $('mistake-more').addEventListener('click', () => { shown += 4 * STEP; draw(); });
  $('mistake-csv').addEventListener('click', save);
  draw();
}

if ($('pairs')) {
  state.listeners.push(drawPairs);
  drawPairs();
}
if ($('disagreements')) drawDisagreements();
if ($('mistake-list')) mistakes();
