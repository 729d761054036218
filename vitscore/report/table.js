// The table of classes: sorted by heading, filtered by name, a number of rows at a time.

function classTable() {
  const table = $('class-table');
  if (!table) return;
  const STEP = classes.length > 100 ? 40 : 100;
  const collator = new Intl.Collator('en', { numeric: true, sensitivity: 'base' });
  const sorting = { column: null, isDown: false };
  let shown = STEP;

  // Each class's most frequent wrong answer.
  function worst(model) {
    if (!model.worst) {
      model.worst = new Map();
      for (let i = 0; i < model.cells.length; i += 3) {
        if (!model.worst.has(model.cells[i])) model.worst.set(model.cells[i], [model.cells[i + 1], model.cells[i + 2]]);
      }
    }
    return model.worst;
  }

  function columns() {
    const model = data.models[state.model];
    const taken = worst(model);
    const others = order.filter((name) => name !== state.model).slice(0, 3);
    const figure = (title, values) => ({ title, value: (id) => values[id], show: (id) => percent(values[id]) });
    return [
      { title: 'class', isText: true, value: (id) => classes[id], show: (id) => classes[id] },
      { title: 'images', value: (id) => model.support[id], show: (id) => number(model.support[id]) },
      { ...figure('F1', model.f1), hasBar: true },
      ...others.map((name) => figure(`F1 of ${name}`, data.models[name].f1)),
      figure('precision', model.precision),
      figure('recall', model.recall),
      {
        title: 'most often taken for', kind: 'name', value: (id) => taken.get(id)?.[1] ?? 0,
        show: (id) => (taken.has(id) ? `${classes[taken.get(id)[0]]} (${number(taken.get(id)[1])})` : ''),
      },
    ];
  }

  function chosen(list) {
    const wanted = $('class-filter').value.trim().toLowerCase();
    const model = data.models[state.model];
    let ids = classes.map((_, id) => id);
    if (wanted) ids = ids.filter((id) => classes[id].toLowerCase().includes(wanted));
    if ($('class-mistakes').checked) ids = ids.filter((id) => model.right[id] < model.support[id]);
    const column = list[sorting.column];
    if (column) {
      const sign = sorting.isDown ? -1 : 1;
      const compare = column.isText ? (a, b) => collator.compare(column.value(a), column.value(b)) : (a, b) => column.value(a) - column.value(b);
      ids.sort((a, b) => sign * compare(a, b) || a - b);
    }
    return ids;
  }

  function heading(list) {
    const row = table.tHead.rows[0];
    row.replaceChildren(...list.map((column, index) => {
      const isSorted = sorting.column === index;
      const sort = isSorted ? (sorting.isDown ? 'descending' : 'ascending') : 'none';
      const press = () => {
        sorting.isDown = isSorted ? !sorting.isDown : !column.isText;
        sorting.column = index;
        shown = STEP;
        draw();
        row.cells[index].firstChild.focus();
      };
      return make('th', { scope: 'col', class: column.kind ?? null, 'aria-sort': sort }, make('button', { type: 'button', onclick: press }, column.title));
    }));
  }

  function line(id, list) {
    return make('tr', {}, ...list.map((column, index) => {
      const cell = make(index ? 'td' : 'th', index ? { class: column.kind ?? null } : { scope: 'row' }, column.show(id));
      if (column.hasBar) {
        const bar = make('i');
        bar.style.width = `${100 * column.value(id)}%`;
        cell.append(make('span', { class: 'bar', 'aria-hidden': 'true' }, bar));
      }
      return cell;
    }));
  }

  function draw() {
    const list = columns();
    const ids = chosen(list);
    heading(list);
    table.tBodies[0].replaceChildren(...ids.slice(0, shown).map((id) => line(id, list)));
    const visible = Math.min(shown, ids.length);
    $('class-count').textContent = visible < classes.length ? `${number(visible)} of ${many(ids.length, 'class')}${ids.length < classes.length ? ` found among ${number(classes.length)}` : ''}.` : `All ${many(classes.length, 'class')}.`;
    $('class-more').hidden = visible === ids.length;
  }

  const again = () => { shown = STEP; draw(); };
  $('class-filter').addEventListener('input', again);
  $('class-mistakes').addEventListener('change', again);
  $('class-more').addEventListener('click', () => { shown += 5 * STEP; draw(); });
  $('class-csv').addEventListener('click', () => {
    const list = columns().slice(0, -1);
    const rows = chosen(columns()).map((id) => list.map((column) => column.value(id)));
    saveCsv(`classes-${state.model}.csv`, [list.map((column) => column.title), ...rows]);
  });
  state.listeners.push(draw);
  draw();
}

classTable();
