// The tokens of the prompt with the weights of one query: shade and outline where there is weight, nothing where the
// weight is exactly 0; and the heaviest keys as a table.

function tokenStrip(prompt, part, name, choose) {
  const strip = element("div", { className: "strip", role: "listbox", tabIndex: 0, "aria-label": `${name}: tokens; arrow keys choose the query` });
  const kind = name.replace(/\W+/g, "-");
  const spans = prompt.tokens.map((token, index) => {
    const span = element("span", { role: "option", id: `token-${kind}-${index}` });
    span.textContent = /^[\n\r]+$/.test(token) ? "\u21b5\n" : token.trim() === "" ? tokenName(token) : token;
    span.dataset.index = index;
    return span;
  });
  strip.append(...spans);
  let dressed = [], now = null;

  const indexOf = (event) => {
    const span = event.target.closest("[role=option]");
    return span ? Number(span.dataset.index) : null;
  };
  strip.addEventListener("click", (event) => {
    const index = indexOf(event);
    if (index !== null) choose(index);
  });
  strip.addEventListener("keydown", (event) => {
    const move = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose.by(move);
  });
  strip.addEventListener("pointermove", (event) => {
    const index = event.pointerType === "mouse" ? indexOf(event) : null;
    if (index === null || !now) tip.hide();
    else tip.show(event, `token ${index}: ${tokenName(prompt.tokens[index])}\n${now.text(index)}`);
  });
  strip.addEventListener("pointerleave", tip.hide);

  return {
    strip,
    show(query, row, text, isSeen) {
      now = { text };
      for (const span of dressed) {
        span.className = "";
        span.style.backgroundColor = span.style.color = "";
        span.removeAttribute("aria-selected");
      }
      dressed = [];
      const dress = (index, name) => { spans[index].classList.add(name); dressed.push(spans[index]); };
      if (row.rest > 0) for (let index = 0; index <= query; index++) if (isSeen(index)) dress(index, "rest");
      row.keys.forEach((key, place) => {
        const colour = mixed("weight", weightLevel(row.weights[place]));
        dress(key, "carries");
        spans[key].classList.remove("rest");
        spans[key].style.backgroundColor = css(colour);
        spans[key].style.color = inkOn(colour);
      });
      for (let index = 0; index < spans.length; index++) {
        if (!isSeen(index)) dress(index, "unseen");
      }
      dress(query, "own");
      spans[query].setAttribute("aria-selected", "true");
      strip.setAttribute("aria-activedescendant", spans[query].id);
      const { offsetTop, offsetHeight } = spans[query];
      if (offsetTop < strip.scrollTop || offsetTop + offsetHeight > strip.scrollTop + strip.clientHeight) {
        strip.scrollTop = offsetTop - strip.clientHeight / 2;
      }
    },
  };
}

const LISTED = 12;

function weightTable(prompt, query, sparse, dense, weightText) {
  const order = Array.from(sparse.keys.keys()).sort((one, other) => sparse.weights[other] - sparse.weights[one]);
  const listed = order.slice(0, LISTED);
  const head = element("tr", {}, ...["Key", "Token", "Weight", ...(dense ? ["Dense model"] : [])].map((text) => element("th", { scope: "col", textContent: text })));
  const rows = listed.map((place) => {
    const key = sparse.keys[place];
    const cells = [String(key), tokenName(prompt.tokens[key]), weightText(sparse, key)];
    if (dense) cells.push(weightText(dense, key));
    return element("tr", {}, ...cells.map((text) => element("td", { textContent: text })));
  });
  const more = order.slice(LISTED).reduce((sum, place) => sum + sparse.weights[place], sparse.rest);
  const others = sparse.support - listed.length;
  const caption = `The heaviest keys of token ${query}, \u201c${tokenName(prompt.tokens[query])}\u201d` +
    (others > 0 ? `; ${others} more hold ${share(Math.min(1, more))} of the weight` : "; no other has weight");
  byId("table").replaceChildren(element("table", {}, element("caption", { textContent: caption }), element("thead", {}, head), element("tbody", {}, ...rows)));
}
