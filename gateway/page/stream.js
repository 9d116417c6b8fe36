// Asks the server for an answer, and reads the server-sent events of which it consists.

/** An error that the server names in a sentence; `status` is that of HTTP. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Returns the headers of a request: with the token, where there is one. */
function headers(token) {
  const common = { "content-type": "application/json" };
  return token ? { ...common, authorization: `Bearer ${token}` } : common;
}

/** Returns the error that an answer other than 200 carries. */
async function errorOf(response) {
  const text = await response.text();
  try {
    return new ServerError(JSON.parse(text).error.message, response.status);
  } catch {
    return new ServerError(`the server answered with status ${response.status}`, response.status);
  }
}

/** Returns the object behind a path of the server. */
export async function get(path, token) {
  const response = await fetch(path, { headers: headers(token) });
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

/**
 * Yields the objects of a stream of events, as they come.
 *
 * @param {string} path of the route
 * @param {object} body of the request, which asks for a stream
 * @param {string} token empty where there is none
 * @param {AbortSignal} signal ends the request
 */
export async function* events(path, body, token, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(token), body: JSON.stringify(body), signal });
  if (!response.ok) throw await errorOf(response);
  let unread = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("the answer broke off", response.status);
    const parts = (unread + value).split("\n\n");
    unread = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new ServerError(found.error.message, response.status);
      yield found;
    }
  }
}
