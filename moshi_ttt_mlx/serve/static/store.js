// Small values kept in this browser. One that keeps nothing (private windows may refuse) still talks.

/** @param {Storage} storage localStorage or sessionStorage, as a function since reading it may throw */
export function load(storage, name) {
  try {
    return JSON.parse(storage().getItem(name));
  } catch {
    return null;
  }
}

export function keep(storage, name, value) {
  try {
    storage().setItem(name, JSON.stringify(value));
  } catch {
    // It holds until the page is closed.
  }
}

export const forever = () => localStorage;
export const thisTab = () => sessionStorage;
