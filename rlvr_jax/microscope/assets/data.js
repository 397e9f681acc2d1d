// The page's data: a manifest, and one block of byte planes a response (see page.py).

async function readBlock(id) {
  const element = document.getElementById(id);
  const text = atob(element.textContent);
  element.remove(); // the text is not needed twice
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function readManifest() {
  return JSON.parse(new TextDecoder().decode(await readBlock("manifest")));
}

// float16 -> float32 by a table of all 65,536 values.
const HALF = (() => {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = (bits & 1023) / 1024;
    if (exponent === 31) table[bits] = fraction ? NaN : sign * Infinity;
    else if (exponent === 0) table[bits] = sign * fraction * 2 ** -14;
    else table[bits] = sign * (1 + fraction) * 2 ** (exponent - 15);
  }
  return table;
})();

// Joins `width` byte planes of `count` values, lowest byte first, shifted left by `shift` bits.
function joinPlanes(bytes, offset, count, width, shift) {
  const out = new Uint32Array(count);
  for (let plane = 0; plane < width; plane++) {
    const start = offset + plane * count;
    const places = 8 * plane + shift;
    for (let i = 0; i < count; i++) out[i] |= bytes[start + i] << places;
  }
  return out;
}

async function readColumns(manifest, index) {
  const bytes = await readBlock(`response-${index}`);
  const length = manifest.responses[index].length;
  const columns = {};
  let offset = 0;
  for (const { name, kind, bytes: width, values } of manifest.layout) {
    const count = length * values;
    const joined = joinPlanes(bytes, offset, count, width, kind === "float" ? 8 * (4 - width) : 0);
    if (kind === "float") columns[name] = new Float32Array(joined.buffer);
    else if (kind === "half") columns[name] = Float32Array.from(joined, (bits) => HALF[bits]);
    else columns[name] = joined;
    offset += count * width;
  }
  return columns;
}

// Columns that follow from others, made when first asked for.
const DERIVED = {
  delta_logp: (c) => c.logp_rl.map((rl, i) => (rl === c.logp_base[i] ? 0 : rl - c.logp_base[i])),
  neg_delta_logp: (c) => column(c, "delta_logp").map((x) => -x),
  abs_delta_logp: (c) => column(c, "delta_logp").map(Math.abs),
  // 1 - p under the model that wrote the response: what the paper's training weight 1 + a (1 - p) grows with.
  weight: (c) => (c.source === "base" ? c.logp_base : c.logp_rl).map((logp) => -Math.expm1(logp)),
};

function column(columns, name) {
  if (!(name in columns)) columns[name] = DERIVED[name](columns);
  return columns[name];
}

// Criteria select small values of these and large values of all others (rlvr_jax.direction.FIRES_BELOW).
const FIRES_BELOW = new Set(["delta_logp", "neg_delta_logp"]);

// Whether a value is selected. NaN never is. The threshold is rounded as the values are: a value equal to it counts.
function selector(criterion, tau) {
  if (criterion === "none") return () => false;
  const limit = Math.fround(tau);
  return FIRES_BELOW.has(criterion) ? (x) => x <= limit : (x) => x >= limit;
}

function countSelected(columns, criterion, tau) {
  if (criterion === "none") return 0;
  const values = column(columns, criterion);
  const limit = Math.fround(tau);
  let count = 0;
  if (FIRES_BELOW.has(criterion)) for (let i = 0; i < values.length; i++) count += values[i] <= limit;
  else for (let i = 0; i < values.length; i++) count += values[i] >= limit;
  return count;
}
