/** A client of Auth0's Management API, as far as `npm run setup` and `npm run doctor` need one. */
import { calculateJwkThumbprint, createRemoteJWKSet, decodeJwt } from "jose";
import { z } from "zod";
import { describeError } from "../../../auth.ts";

const TIMEOUT_MS = 10_000;
const PAGE_SIZE = 50;
const MAX_TRIES = 6;

/** Replaced in tests, which must not sleep. */
export type Wait = (milliseconds: number) => Promise<unknown>;

/** Auth0 has refused a request because of its rate limit, and changed nothing. */
class RateLimited extends Error {
  /** To wait before the next request. */
  seconds = 1;
}

/** Caches what it reads until it writes something. */
export class ManagementClient {
  readonly #issuer: URL;
  readonly #token: string;
  readonly #wait: Wait;
  readonly #say: (line: string) => void;
  /** `https://<tenant>/api/v2/`, as the token names it. */
  readonly #api: URL;
  #domainCheck: Promise<void> | undefined;
  readonly #read = new Map<string, unknown>();

  constructor(issuer: string, token: string, wait: Wait, say: (line: string) => void) {
    this.#issuer = new URL(issuer);
    this.#token = token;
    this.#wait = wait;
    this.#say = say;
    this.#api = apiOf(token);
  }

  forget(): void {
    this.#read.clear();
  }

  async get<T>(path: string, schema: z.ZodType<T>): Promise<T> {
    if (!this.#read.has(path)) this.#read.set(path, await this.patiently(() => this.#request("GET", path)));
    const { data, error } = schema.safeParse(this.#read.get(path));
    if (error) throw new Error(`GET ${path}: an answer that is not expected. ${z.prettifyError(error)}`);
    return data;
  }

  /** All pages. A page is an array, or an object that holds one. */
  async list<T>(path: string, schema: z.ZodType<T>): Promise<T[]> {
    const page = z.preprocess(
      (answer) =>
        Array.isArray(answer)
          ? { items: answer }
          : { ...Object(answer), items: Object.values(Object(answer)).find(Array.isArray) },
      z.object({ items: z.array(schema), next: z.string().nullish(), total: z.number().nullish() }),
    );
    // Connections and client grants go on where `next` says, all others by number.
    const goesByNext = /^(connections|client-grants)/.test(path);
    const start = `${path}${path.includes("?") ? "&" : "?"}${goesByNext ? "take" : "per_page"}=${PAGE_SIZE}`;
    const all: T[] = [];
    for (let number = 0, from = "";; number++) {
      const where = goesByNext ? from && `&from=${encodeURIComponent(from)}` : `&page=${number}`;
      const { items, next, total } = await this.get(`${start}${where}`, page);
      all.push(...items);
      from = next ?? "";
      const isLast = items.length === 0 || (total ? all.length >= total : items.length < PAGE_SIZE);
      if (goesByNext ? !from : isLast) return all;
      if (number === 1_000) throw new Error(`GET ${path}: the pages have no end`);
    }
  }

  /** Not repeated here after a 429: by then another change may be the right one. */
  async send(method: "POST" | "PATCH", path: string, body?: unknown): Promise<unknown> {
    this.forget();
    return await this.#request(method, path, body);
  }

  /** Does something, and after a 429 waits and does it again from its beginning. */
  async patiently<T>(act: () => Promise<T>): Promise<T> {
    for (let tries = 1;; tries++) {
      try {
        return await act();
      } catch (error) {
        if (!(error instanceof RateLimited) || tries === MAX_TRIES) throw error;
        this.#say(`Auth0 limits the rate: going on in ${error.seconds} s`);
        await this.#wait(error.seconds * 1_000);
      }
    }
  }

  /** Asks once a second until the answer is ready. */
  async until<T>(path: string, schema: z.ZodType<T>, isReady: (answer: T) => boolean): Promise<void> {
    for (let tries = 0; tries < 30; tries++) {
      if (isReady(await this.get(path, schema))) return;
      this.forget();
      await this.#wait(1_000);
    }
    throw new Error(`${path} is not ready after half a minute: look at it in the dashboard, and run this again`);
  }

  async #request(method: string, path: string, body?: unknown): Promise<unknown> {
    await (this.#domainCheck ??= checkDomain(this.#issuer, this.#api));
    const url = new URL(path, this.#api);
    const response = await fetch(url, {
      method,
      headers: { authorization: `Bearer ${this.#token}`, "content-type": "application/json" },
      redirect: "manual",
      signal: AbortSignal.timeout(TIMEOUT_MS),
      ...(body !== undefined && { body: JSON.stringify(body) }),
    }).catch((error: unknown) => {
      throw new Error(`${url.origin} cannot be reached: ${describeError(error)}`);
    });
    const answer: unknown = await response.json().catch(() => undefined);
    if (response.ok && answer !== undefined) return answer;
    const message = explain(`${method} ${path.split("?", 1)[0]}`, response.status, answer);
    if (response.status !== 429) throw new Error(message);
    throw Object.assign(new RateLimited(message), { seconds: secondsToWait(response.headers) });
  }
}

/** The API that the token was issued for: its `aud`, which names the tenant's own domain, never a custom one. */
function apiOf(token: string): URL {
  let audience: string[] = [];
  try {
    if (/^[\w.-]+$/.test(token)) audience = [decodeJwt(token).aud ?? []].flat();
  } catch {
    // It is not a JWT, or holds what no header can: those errors would quote it.
  }
  const api = audience.find((one) => /^https?:\/\/[^/]+\/api\/v2\/$/.test(one));
  if (api !== undefined) return new URL(api);
  const what = audience.length === 0 ? "not a token" : `for ${audience.join(", ")}, not for Auth0's Management API`;
  throw new Error(`AUTH0_MANAGEMENT_TOKEN is ${what}: copy it whole from the API Explorer, and nothing else`);
}

/** A mistyped domain must not get the token. */
async function checkDomain(issuer: URL, api: URL): Promise<void> {
  if (issuer.origin === api.origin) return;
  const [keys, expected] = await Promise.all([issuer, api].map(readSigningKeys)).catch(() => []);
  if (keys && keys === expected) return; // a custom domain of the same tenant
  throw new Error(
    `AUTH0_DOMAIN is ${issuer.host} and AUTH0_MANAGEMENT_TOKEN is for ${api.host}, which does not publish the same ` +
      "signing keys. Nothing was sent: correct AUTH0_DOMAIN, or copy the token of its tenant",
  );
}

/** As thumbprints (RFC 7638), since hosts may write the same key differently. */
async function readSigningKeys(host: URL): Promise<string> {
  const keySet = createRemoteJWKSet(new URL("/.well-known/jwks.json", host));
  await keySet.reload();
  const thumbprints = await Promise.all(keySet.jwks()?.keys.map((key) => calculateJwkThumbprint(key)) ?? []);
  return thumbprints.sort().join(" ");
}

function secondsToWait(headers: Headers): number {
  const after = Number(headers.get("retry-after"));
  const reset = Number(headers.get("x-ratelimit-reset")) - Date.now() / 1_000;
  return Math.ceil(Math.min(after > 0 ? after : reset > 0 ? reset : 1, 60));
}

function explain(request: string, status: number, answer: unknown): string {
  const { data } = z.object({ message: z.string(), errorCode: z.string().optional() }).safeParse(answer);
  if (!data) return `${request}: ${status}, and not in Auth0's words. Compare AUTH0_DOMAIN with the tenant's domain`;
  if (status === 401) return `Auth0 refuses AUTH0_MANAGEMENT_TOKEN: ${data.message}. Copy a new one, as --help says`;
  const isScope = data.errorCode === "insufficient_scope";
  return `${request}: ${isScope ? "AUTH0_MANAGEMENT_TOKEN lacks a scope" : status}: ${data.message}`;
}
