// Colours of lines and of maps.

const PALETTE = ["#009E73", "#CC79A7", "#0072B2", "#D55E00", "#56B4E9", "#E69F00"];
const DASHES = {"-": "", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"};

const channels = (text) => (text.match(/[\d.]+/g) || [255, 255, 255]).slice(0, 3).map(Number);
function paper() { return channels(getComputedStyle(document.body).backgroundColor); }
function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
// From the page's own colour to red where positive, to blue where negative; the text is what contrasts more.
function shade(t, ground) {
  const end = t < 0 ? [33, 102, 172] : [190, 60, 35];
  const part = Math.min(1, Math.abs(t)) ** 0.8;
  const rgb = ground.map((c, i) => Math.round(c + (end[i] - c) * part));
  const light = luminance(rgb);
  return `background:rgb(${rgb});color:${(light + 0.05) / 0.05 > 1.05 / (light + 0.05) ? "#000" : "#fff"}`;
}
// Values -> [−1, 1]: diverging from 0, or between the two ends where all lie on one side and far from 0.
function scale(values) {
  const known = values.filter((v) => v !== null);
  const low = Math.min(...known), high = Math.max(...known), most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  if (low > 0.3 * high) return {of: (v) => high > low ? (v - low) / (high - low) : 0.5, low, high, from: low, most};
  return {of: (v) => v / most, low, high, from: 0, most};
}
