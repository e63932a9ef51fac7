// Two answers side by side, aligned by their tokens.

const MOST = 2000;

/**
 * Aligns the common part of two lists of texts by a longest common subsequence.
 *
 * Returns the place of the first difference in both (-1: none), the number of tokens that agree, the number that were
 * compared, and the places in each list that have no partner.
 */
export function align(one, two) {
  const compared = Math.min(one.length, two.length);
  let start = 0;
  while (start < compared && one[start] === two[start]) start += 1;
  const rest = compared - start;
  const pairs = rest && rest <= MOST ? pair(one, two, start, compared) : [];
  const inOne = new Set(pairs.map(([i]) => i));
  const inTwo = new Set(pairs.map(([, j]) => j));
  const others = (found) => Array.from({ length: rest }, (_, k) => start + k).filter((k) => !found.has(k));
  return {
    first: rest ? start : -1,
    agreed: start + pairs.length,
    compared,
    others: [new Set(others(inOne)), new Set(others(inTwo))],
  };
}

function pair(one, two, start, end) {
  const size = end - start;
  const width = size + 1;
  // longest[i * width + j]: length of the longest common subsequence of one[start + i ..] and two[start + j ..].
  const longest = new Uint16Array(width * width);
  for (let i = size - 1; i >= 0; i -= 1) {
    for (let j = size - 1; j >= 0; j -= 1) {
      const here = i * width + j;
      longest[here] =
        one[start + i] === two[start + j]
          ? longest[here + width + 1] + 1
          : Math.max(longest[here + width], longest[here + 1]);
    }
  }
  const pairs = [];
  for (let i = 0, j = 0; i < size && j < size; ) {
    const here = i * width + j;
    if (one[start + i] === two[start + j]) pairs.push([start + i++, start + j++]);
    else if (longest[here + width] >= longest[here + 1]) i += 1;
    else j += 1;
  }
  return pairs;
}

/** Says the comparison in a sentence; `isOver`: whether both answers have ended. */
export function inWords(found, isOver) {
  if (!found.compared) return "";
  const share = Math.round((100 * found.agreed) / found.compared);
  const agreed = `${found.agreed} of ${found.compared} tokens agree with the source (${share}%).`;
  if (found.first >= 0) return `First difference at token ${found.first + 1}. ${agreed}`;
  return isOver ? `The same tokens. ${agreed}` : `No difference yet. ${agreed}`;
}
