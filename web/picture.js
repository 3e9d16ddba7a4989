// Brings a picture to the pixels that the model reads, as Pillow and SiQ-VL's processor do: the same numbers.

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weight(x) {
      const a = -0.5;
      const t = Math.abs(x);
      if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
      if (t < 2) return (((t - 5) * t + 8) * t - 4) * a;
      return 0;
    },
  },
};
const PRECISION = 2 ** 22; // Pillow computes in integers, with weights of 22 bits

// The weights of each output pixel: where they begin in the input, and the integers themselves.
function weightsOf(inputLength, outputLength, filter) {
  const scale = inputLength / outputLength;
  const stretch = Math.max(scale, 1);
  const reach = filter.support * stretch;
  const all = [];
  for (let place = 0; place < outputLength; place++) {
    const center = (place + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(inputLength, Math.trunc(center + reach + 0.5));
    const weights = [];
    let sum = 0;
    for (let x = start; x < end; x++) {
      const weight = filter.weight((x - center + 0.5) / stretch);
      weights.push(weight);
      sum += weight;
    }
    all.push({ start, weights: weights.map((weight) => roundAwayFromZero((weight / sum) * PRECISION)) });
  }
  return all;
}

function roundAwayFromZero(value) {
  return Math.trunc(value + (value < 0 ? -0.5 : 0.5));
}

// Resizes along one axis. Pixels lie `step` apart along it; `lines` gives where each line begins.
function resizeLines(input, output, lines, inputStep, outputStep, weights) {
  for (const [from, to] of lines) {
    for (let place = 0; place < weights.length; place++) {
      const { start, weights: own } = weights[place];
      for (let colour = 0; colour < 3; colour++) {
        let sum = PRECISION / 2;
        for (let k = 0; k < own.length; k++) sum += input[from + (start + k) * inputStep + colour] * own[k];
        output[to + place * outputStep + colour] = Math.min(255, Math.max(0, Math.floor(sum / PRECISION)));
      }
    }
  }
}

// rgb: three bytes a pixel, row by row. Returns the same of another size; rows first, then columns, as Pillow does.
export function resize(rgb, width, height, newWidth, newHeight, filterName) {
  const filter = FILTERS[filterName];
  let pixels = rgb;
  if (newWidth !== width) {
    const lines = Array.from({ length: height }, (_, row) => [row * width * 3, row * newWidth * 3]);
    const wider = new Uint8Array(height * newWidth * 3);
    resizeLines(pixels, wider, lines, 3, 3, weightsOf(width, newWidth, filter));
    pixels = wider;
  }
  if (newHeight !== height) {
    const lines = Array.from({ length: newWidth }, (_, column) => [column * 3, column * 3]);
    const higher = new Uint8Array(newHeight * newWidth * 3);
    resizeLines(pixels, higher, lines, newWidth * 3, newWidth * 3, weightsOf(height, newHeight, filter));
    pixels = higher;
  }
  return pixels;
}

// rgba: what a canvas holds, opaque. Returns floats, one plane for each colour.
export function pixelValues(rgba, width, height, settings) {
  const rgb = new Uint8Array(width * height * 3);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let colour = 0; colour < 3; colour++) rgb[pixel * 3 + colour] = rgba[pixel * 4 + colour];
  }
  const { side, filter, rescale, mean, std } = settings;
  const resized = resize(rgb, width, height, side, side, filter);
  const values = new Float32Array(3 * side * side);
  for (let colour = 0; colour < 3; colour++) {
    const average = Math.fround(mean[colour]);
    const deviation = Math.fround(std[colour]);
    for (let pixel = 0; pixel < side * side; pixel++) {
      const scaled = Math.fround(resized[pixel * 3 + colour] * rescale);
      values[colour * side * side + pixel] = Math.fround(scaled - average) / deviation;
    }
  }
  return values;
}
