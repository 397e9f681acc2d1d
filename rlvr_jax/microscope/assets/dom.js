// Elements and numbers. Texts of the data reach the document through textContent alone.

const NARROW = matchMedia("(max-width: 720px)"); // as in page.css: one column, the controls folded
const $ = (id) => document.getElementById(id);

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const MINUS = "\u2212";
const GROUPED = new Intl.NumberFormat("en");
const grouped = (count) => GROUPED.format(count);

// "1.84", "−0.30", "−∞"; with a plus sign where `sign` asks for one.
function decimal(value, digits = 2, sign = false) {
  if (Number.isNaN(value)) return "n/a";
  if (!Number.isFinite(value)) return (value < 0 ? MINUS : sign ? "+" : "") + "∞";
  const size = Math.abs(value);
  const text = size > 0 && size < 0.5 * 10 ** -digits ? scientific(size) : size.toFixed(digits);
  if (value < 0) return MINUS + text;
  return (sign && value > 0 ? "+" : "") + text;
}

const RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹";
function scientific(size) {
  const [digits, exponent] = size.toExponential(0).split("e-");
  return `${digits}·10⁻${[...exponent].map((digit) => RAISED[digit]).join("")}`;
}

// A probability in percent, with three digits where there are as many.
function percent(p) {
  const value = 100 * p;
  if (!(value > 0)) return "0%";
  if (value >= 99.995) return "100%";
  if (value >= 99) return `${value.toFixed(2)}%`;
  if (value >= 10) return `${value.toFixed(1)}%`;
  if (value >= 0.1) return `${value.toFixed(2)}%`;
  return value >= 0.0005 ? `${value.toFixed(3)}%` : "<0.001%";
}

const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part * 100 < whole * 10 ? 2 : 1)}%` : "0%");

// A token's text on one line: spaces at its ends and what has no shape are made visible.
function visible(text) {
  if (text === "") return "◌";
  return substitute(text)
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
}

// The same as nodes, what stands for something invisible set back.
function shown(text) {
  const marks = visible(text).split(/([·↵⇥◌]+)/);
  return marks.filter(Boolean).map((part) => (/^[·↵⇥◌]/.test(part) ? h("span", { class: "dim" }, part) : part));
}

// What a prompt asks, on one line: its last user turn, without the marks of a chat template.
function excerpt(prompt) {
  const turn = prompt.split("<|im_start|>user").at(-1).split("<|im_end|>")[0];
  return turn.replace(/<\|\w*\|>/g, " ").trim().replace(/\s+/g, " ").slice(0, 300);
}

// Control characters as their pictures; invisible ones and those that turn the writing direction as a box. Newline and
// tab stay, and so do the joiners that emoji and Persian need.
const SHAPELESS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
function substitute(text) {
  return text.replace(SHAPELESS, (character) => {
    const code = character.codePointAt(0);
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    return code === 127 ? "␡" : "▯";
  });
}

// A canvas as large as it is shown, in the screen's own pixels; null while it is not shown.
function sizedCanvas(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !height) return null;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return { context, width, height };
}

const cssColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// One call a frame, however often it is asked for.
function oncePerFrame(callback) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      callback();
    });
  };
}
