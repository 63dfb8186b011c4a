// Questions to the server beside the talk, with the token where there is one.

/** A path of ours, for fetch and for links. */
export function withToken(path, token) {
  return token ? `${path}?token=${encodeURIComponent(token)}` : path;
}

/** A talk's file: transcript.FORMAT or audio.wav. */
export const talkFile = (key, name) => `/api/talks/${encodeURIComponent(key)}/${name}`;

/** The answer as JSON, or null when the server is gone or refuses. */
export async function ask(path, token = null) {
  try {
    const response = await fetch(withToken(path, token));
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}
