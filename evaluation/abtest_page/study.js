"use strict";

/**
 * One person's way through the trials: what comes when, in which order its images stand, and what was chosen.
 * It knows nothing of the page. `state` is plain data, to be kept and given back as `stored`.
 */
class Study {
  constructor(test, stored, random) {
    this.test = test;
    this.state = stored || {
      session: Array.from({ length: 16 }, () => Math.floor(random() * 16).toString(16)).join(""),
      order: shuffled(test.trials.map((_, trial) => trial), random),
      shown: test.trials.map((trial) => shuffled(trial.images, random)),
      choices: {}, // by trial: { chosen, at }
      position: 0,
    };
  }

  /** What to show now, or null behind the last trial. */
  current() {
    const trial = this.state.order[this.state.position];
    if (trial === undefined) return null;
    const { prompt, condition } = this.test.trials[trial];
    return { prompt, condition, images: this.state.shown[trial], chosen: this.state.choices[trial]?.chosen };
  }

  /** The images of the trial after this one, to be loaded ahead. */
  upcoming() {
    const trial = this.state.order[this.state.position + 1];
    return trial === undefined ? [] : this.state.shown[trial];
  }

  /** Choose the image at a place, from 0, and go on. A place without an image changes nothing. */
  choose(place, at) {
    const trial = this.state.order[this.state.position];
    const chosen = trial === undefined ? undefined : this.state.shown[trial][place];
    if (chosen === undefined) return;
    this.state.choices[trial] = { chosen, at };
    this.state.position += 1;
  }

  back() {
    this.state.position = Math.max(0, this.state.position - 1);
  }

  /** What is saved for the person who counts. */
  file() {
    const choices = Object.entries(this.state.choices).map(([trial, { chosen, at }]) => ({
      trial: Number(trial),
      chosen,
      shown: this.state.shown[trial],
      at,
    }));
    return { format: 1, test: this.test.id, session: this.state.session, choices };
  }
}

/** Fisher and Yates. */
function shuffled(values, random) {
  const result = [...values];
  for (let last = result.length - 1; last > 0; last -= 1) {
    const place = Math.floor(random() * (last + 1));
    [result[last], result[place]] = [result[place], result[last]];
  }
  return result;
}
