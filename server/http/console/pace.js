// Tokens per second of an answer as it arrives, for as long as that can be told.

// What arrives together with the first token was made before it got here: nothing is known of when.
const TOGETHER = 0.02;
const FEWEST_TOKENS = 4;
const SHORTEST = 0.1;

export class Pace {
  constructor() {
    this.first = null;
    this.newest = 0;
    this.before = 0;
    this.behind = 0;
  }

  /** So many tokens have arrived, at so many seconds. */
  take(tokens, at) {
    this.first ??= at;
    if (at - this.first <= TOGETHER) this.before += tokens;
    else this.behind += tokens;
    this.newest = at;
  }

  /** Null where an answer is too short to tell. */
  get rate() {
    const seconds = this.newest - (this.first ?? 0);
    return this.behind < FEWEST_TOKENS || seconds < SHORTEST ? null : this.behind / seconds;
  }
}
