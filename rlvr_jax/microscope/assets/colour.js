// Colours. Scales run through OKLab, so that equal steps look equal; the middle (or the start) is the paper itself.
// Blue against orange is told apart by readers with any of the common colour blindnesses, and by lightness in grey.

const PALETTE = {
  light: {
    paper: [0.992, 0.0, 95],
    raised: [0.7, 0.13, 252], // [lightness, chroma, hue] of the ends
    lowered: [0.735, 0.145, 55],
    entropy: [0.71, 0.13, 305],
    divergence: [0.72, 0.115, 178],
    weight: [0.76, 0.135, 92],
  },
  dark: {
    paper: [0.205, 0.004, 260],
    raised: [0.515, 0.14, 256],
    lowered: [0.52, 0.125, 48],
    entropy: [0.51, 0.15, 305],
    divergence: [0.51, 0.095, 185],
    weight: [0.52, 0.105, 90],
  },
};
const STEPS = 64; // on either side of the middle

function oklchToRgb([lightness, chroma, hue]) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  return oklabToRgb([lightness, a, b]);
}

function oklabToRgb([lightness, a, b]) {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((x) => {
    const value = x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055;
    return Math.round(255 * Math.min(1, Math.max(0, value)));
  });
}

// STEPS + 1 colours from the paper to `end`.
function ramp(paper, end) {
  const lab = ([lightness, chroma, hue]) => [
    lightness,
    chroma * Math.cos((hue * Math.PI) / 180),
    chroma * Math.sin((hue * Math.PI) / 180),
  ];
  const [from, to] = [lab(paper), lab(end)];
  return Array.from({ length: STEPS + 1 }, (_, i) => {
    const rgb = oklabToRgb(from.map((x, axis) => x + ((to[axis] - x) * i) / STEPS));
    return `rgb(${rgb.join(",")})`;
  });
}

// What can be coloured. `extent` names the criterion whose range the colours have.
const MEASURES = {
  delta_logp: { group: "delta", signed: true, tone: "raised", unit: "nats" },
  entropy_rl: { group: "entropy", tone: "entropy", unit: "nats" },
  entropy_base: { group: "entropy", tone: "entropy", unit: "nats" },
  kl: { group: "kl", tone: "divergence", unit: "nats" },
  kl_reverse: { group: "kl", tone: "divergence", unit: "nats" },
  js: { group: "kl", tone: "divergence", unit: "nats" },
  js_true: { group: "kl", tone: "divergence", unit: "nats" },
  weight: { group: "weight", tone: "weight", unit: "" },
};

// value -> one of 2 STEPS + 1 colours; index 0 is the middle of a signed scale or the start of another.
class Scale {
  constructor(measure, range, theme) {
    const palette = PALETTE[theme];
    const { signed, tone } = MEASURES[measure];
    this.signed = Boolean(signed);
    this.range = range;
    this.up = ramp(palette.paper, palette[tone]);
    this.down = signed ? ramp(palette.paper, palette.lowered) : null;
  }

  // Distance from the middle, 0 to 1, with the sign of the value.
  place(value) {
    const at = value / this.range;
    if (Number.isNaN(at)) return 0;
    return Math.max(this.signed ? -1 : 0, Math.min(1, at));
  }

  // The empty string where the paper shows through: most tokens of most responses.
  colour(value) {
    const step = Math.round(this.place(value) * STEPS);
    if (step === 0) return "";
    return step > 0 ? this.up[step] : this.down[-step];
  }

  // A stronger colour, for marks that are too small to show a weak one.
  vivid(value) {
    const place = this.place(value);
    return this.colour(Math.sign(place) * Math.abs(place) ** 0.6 * this.range);
  }

  gradient() {
    const stops = [...(this.down ? [...this.down].reverse().slice(0, -1) : []), ...this.up];
    return `linear-gradient(to right, ${stops.filter((_, i) => i % 8 === 0).join(", ")})`;
  }
}
