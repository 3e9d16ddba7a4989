// Takes an output apart, finished or still growing: steps of reasoning, their clauses, and the answer, each with its place.

const TAGS = ["<think>", "</think>", "<answer>", "</answer>"];
const NUMBERING = /^(?:\(?\d{1,2}[.)]|[-*•])$/;

export function takeApart(output) {
  const text = withoutBegunTag(output);
  const thought = between(text, "<think>", "</think>");
  let answer = between(text, "<answer>", "</answer>");
  // Without tags, all of it is the answer.
  if (answer === null && thought === null) answer = part(text, 0);
  const steps = [];
  if (thought !== null) {
    for (const step of split(thought, /(?<=[.!?])\s+|\n+/g)) {
      if (!NUMBERING.test(step.text)) steps.push(split(step, /(?<=[,;:])\s+/g));
    }
  }
  return { steps, answer: answer !== null && answer.text !== "" ? answer : null };
}

// What lies between two tags, or after the first as long as the second is not there; without space at its ends.
function between(text, opening, closing) {
  const begin = text.indexOf(opening);
  if (begin < 0) return null;
  const start = begin + opening.length;
  const end = text.indexOf(closing, start);
  return part(text.slice(start, end < 0 ? undefined : end), start);
}

function part(text, start) {
  const shown = text.trim();
  return { text: shown, start: start + text.indexOf(shown), end: start + text.indexOf(shown) + shown.length };
}

function withoutBegunTag(text) {
  for (let length = Math.min(text.length, "</answer>".length - 1); length > 0; length--) {
    const end = text.slice(-length);
    if (TAGS.some((tag) => tag.startsWith(end))) return text.slice(0, -length);
  }
  return text;
}

function split({ text, start }, separator) {
  const pieces = [];
  let begin = 0;
  for (const match of [...text.matchAll(separator), { index: text.length, 0: "" }]) {
    if (match.index > begin) pieces.push(part(text.slice(begin, match.index), start + begin));
    begin = match.index + match[0].length;
  }
  return pieces;
}
