/** A client of Auth0's Management API, as far as `npm run setup` and `npm run doctor` need one. */
import { z } from "zod";
import { describeError } from "../../../auth.ts";

const TIMEOUT_MS = 10_000;
const PAGE_SIZE = 50;

/** Where the tests do not want to sleep. */
export type Wait = (milliseconds: number) => Promise<unknown>;

/** What was read is remembered until something is written. */
export class ManagementClient {
  readonly #base: URL;
  readonly #token: string;
  readonly #wait: Wait;
  readonly #say: (line: string) => void;
  readonly #read = new Map<string, unknown>();

  constructor(issuer: string, token: string, wait: Wait, say: (line: string) => void) {
    // A header that cannot be sent would be quoted in the error.
    if (!/^[\w.~+/=-]+$/.test(token)) {
      throw new Error("AUTH0_MANAGEMENT_TOKEN is not a token: copy it whole, and nothing else");
    }
    this.#base = new URL("api/v2/", issuer);
    this.#token = token;
    this.#wait = wait;
    this.#say = say;
  }

  forget(): void {
    this.#read.clear();
  }

  async get<T>(path: string, schema: z.ZodType<T>): Promise<T> {
    if (!this.#read.has(path)) this.#read.set(path, await this.#request("GET", path));
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
    }
  }

  async send(method: "POST" | "PATCH", path: string, body?: unknown): Promise<unknown> {
    this.forget();
    return await this.#request(method, path, body);
  }

  /** Asks once a second until the answer is ready. */
  async until<T>(path: string, schema: z.ZodType<T>, isReady: (answer: T) => boolean): Promise<void> {
    for (let tries = 0; tries < 30; tries++) {
      if (isReady(await this.get(path, schema))) return;
      this.forget();
      await this.#wait(1_000);
    }
    throw new Error(
      `${path} is not ready after half a minute: look at it in the dashboard, and run this again`,
    );
  }

  async #request(method: string, path: string, body?: unknown): Promise<unknown> {
    const url = new URL(path, this.#base);
    for (let tries = 0;; tries++) {
      const response = await fetch(url, {
        method,
        headers: { authorization: `Bearer ${this.#token}`, "content-type": "application/json" },
        redirect: "manual",
        signal: AbortSignal.timeout(TIMEOUT_MS),
        ...(body !== undefined && { body: JSON.stringify(body) }),
      }).catch((error: unknown) => {
        throw new Error(`${url.origin} cannot be reached: ${describeError(error)}`);
      });
      const text = await response.text();
      if (response.status === 429 && tries < 5) { // nothing was done, so that a POST may be repeated as well
        const seconds = secondsToWait(response.headers);
        this.#say(`Auth0 limits the rate: going on in ${seconds} s`);
        await this.#wait(seconds * 1_000);
        continue;
      }
      const answer = parse(text);
      if (response.ok && (answer !== undefined || text === "")) return answer;
      throw new Error(explain(`${method} ${path.split("?", 1)[0]}`, response.status, answer));
    }
  }
}

function secondsToWait(headers: Headers): number {
  const after = Number(headers.get("retry-after"));
  const reset = Number(headers.get("x-ratelimit-reset")) - Date.now() / 1_000;
  return Math.ceil(Math.min(after > 0 ? after : reset > 0 ? reset : 1, 60));
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function explain(request: string, status: number, answer: unknown): string {
  const { data } = z.object({ message: z.string(), errorCode: z.string().optional() }).safeParse(answer);
  if (!data) {
    return `${request}: ${status}, and not in Auth0's words. Compare AUTH0_DOMAIN with the tenant's domain`;
  }
  if (status === 401) {
    return `Auth0 refuses AUTH0_MANAGEMENT_TOKEN: ${data.message}. Copy a new one, as --help says`;
  }
  const isScope = data.errorCode === "insufficient_scope";
  return `${request}: ${isScope ? "AUTH0_MANAGEMENT_TOKEN lacks a scope" : status}: ${data.message}`;
}
