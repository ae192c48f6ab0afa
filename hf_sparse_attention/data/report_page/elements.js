// Text enters the page through these alone, always as text, never as markup.

const byId = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made && key !== "role" && !key.startsWith("aria")) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A tooltip beside the pointer. What it says can also be read on the page without a pointer.
const tip = {
  show(event, text) {
    const box = byId("tip");
    box.textContent = text;
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - width - 8);
    const above = event.clientY + height + 28 > innerHeight;
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${above ? Math.max(8, event.clientY - height - 12) : event.clientY + 16}px`;
  },
  hide() {
    byId("tip").hidden = true;
  },
};

const whole = (value) => value.toLocaleString("en", { maximumFractionDigits: 0 });
const count = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 1 : 0 });
const decimal = (value, digits) => value.toFixed(digits);
const keys = (value) => `${count(value)} ${value === 1 ? "key" : "keys"}`;

// A share rounded, but never to 0 % or 100 % if it is neither: exactly zero is another thing than nearly zero.
function share(value, digits = 1) {
  const text = (100 * value).toFixed(digits);
  const step = 10 ** -digits;
  if (value > 0 && Number(text) === 0) return `<${step.toFixed(digits)} %`;
  if (value < 1 && Number(text) === 100) return `>${(100 - step).toFixed(digits)} %`;
  return `${value === 0 || value === 1 ? 100 * value : text} %`;
}

// White space and control characters would not be seen.
function tokenName(text) {
  return text.replace(/ /g, "\u2423").replace(/\n/g, "\\n").replace(/\t/g, "\\t")
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
      (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}
