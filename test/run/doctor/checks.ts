/** What the doctor looks at: each check says what it has found, or throws what is wrong with it. */
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import * as oauth from "@modelcontextprotocol/sdk/client/auth.js";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import * as schemas from "@modelcontextprotocol/sdk/shared/auth.js";
import { decodeProtectedHeader } from "jose";
import { z } from "zod";
import { createAuthenticator, describeError, metadataUrl } from "../../../auth.ts";
import type { Caller } from "../../../auth.ts";
import type { Way } from "../setup/guide.ts";

const TIMEOUT_MS = 10_000;
const SIGN_IN_MINUTES = 5;
const CLIENT_NAME = "chatgpt-auth0-mcp doctor";

/** What ChatGPT uses where the tenant identifies itself in every answer (RFC 9207), and where it does not. */
const STABLE = {
  callback: "https://chatgpt.com/connector_platform_oauth_redirect",
  document: "https://chatgpt.com/oauth/client.json",
};
const PER_CONNECTION = {
  callback: "https://chatgpt.com/connector/oauth/{callback_id}, which its page shows",
  document: "https://chatgpt.com/oauth/{callback_id}/client.json, which its page shows",
};

/** Says what it has found, and keeps it for the checks after it. Throws what is missing, or `CannotTell`. */
export type Run = (found: Found, token: Token) => string | Promise<string>;

/** What there is to begin with, and what the checks have found for those after them. */
export interface Found {
  serverUrl: string;
  port: number;
  issuer: string;
  /** Of `Options`. */
  client: string | undefined;
  /** AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET. */
  id: string | undefined;
  secret: string | undefined;
  openBrowser: (url: string) => void | Promise<void>;
  print: (text: string) => void;
  /** How ChatGPT becomes a client, where that is known. */
  way?: Way;
  /** What is hidden wherever it is quoted. */
  secrets: Set<string>;
  /** What `missing` was said of, by its cause. */
  causes: Map<string, string>;
  /** Of the authorization request, so that no other answer is taken. */
  state: string;
  answer?: Response;
  resource?: schemas.OAuthProtectedResourceMetadata;
  tenant?: schemas.OAuthMetadata;
  /** How many signing keys can be used. */
  keys?: number;
  clientInformation?: { client_id: string };
  callback?: string;
  listener?: Awaited<ReturnType<typeof listenForAnswer>>;
  authorization?: { authorizationUrl: URL; codeVerifier: string };
  signedIn?: URLSearchParams;
  grant?: schemas.OAuthTokens;
}

/** The access token of a section, and what has been found of it. */
export interface Token {
  text?: string;
  jwt?: string;
  caller?: Caller;
  mcp?: Client;
}

export class CannotTell extends Error {}

/** What an earlier check has found. */
function need<T>(value: T | undefined, name: string): T {
  if (value === undefined) throw new CannotTell(`not checked, since it needs ${name}`);
  return value;
}

function compare(found: string | null | undefined, expected: string): string {
  if (found !== expected) throw new Error(`found ${found || "none"}, expected ${expected}`);
  return expected;
}

export function hide({ secrets }: Pick<Found, "secrets">, ...texts: (string | undefined)[]): void {
  for (const text of texts) if (text) secrets.add(text);
}

/** Words of Auth0's that name another step than the one at hand, and are headings of the README's troubleshooting. */
const CAUSES: [words: RegExp, step: number, remedy: string][] = [
  [/You reached the limit of entities of this type for this tenant/, 2, "Delete what attempts have left"],
  [/Unknown client/, 2, "Import the client's document"],
  [/Callback URL mismatch/, 5, "Allow this callback in the application"],
  [/no connections enabled for the client/, 3, "Promote a connection to domain level"],
  [/Service not found(?=: MCP_SERVER_URL(?!\S))/, 1, "Create an API with this Identifier"],
  // Not what was asked for, so it is what the tenant has put in its place.
  [/Service not found/, 2, "The Default Audience must equal MCP_SERVER_URL"],
  [/is not authorized to access resource server/, 1, "Set the Default Permissions"],
];

/** @returns The step, the remedy and the heading. */
export function findCause(
  said: string,
  { serverUrl }: Found,
): [step: number, remedy: string, heading: string] | undefined {
  for (const [words, step, remedy] of CAUSES) {
    const [heading] = words.exec(said.replaceAll(serverUrl, "MCP_SERVER_URL")) ?? [];
    if (heading !== undefined) return [step, remedy, heading];
  }
  return undefined;
}

// --------------------------------------------------------------------------------------------- requests

/** `fetch` that neither waits for ever nor follows a redirect. */
async function ask(url: string | URL, init: RequestInit = {}): Promise<Response> {
  try {
    return await fetch(url, { signal: AbortSignal.timeout(TIMEOUT_MS), ...init, redirect: "manual" });
  } catch (error) {
    throw new Error(`${String(url).split("?", 1)[0]} cannot be reached: ${describeError(error)}`);
  }
}

/** The same for the SDK, whose own errors leave out the status and whatever is not in OAuth's form. */
async function askForSuccess(url: string | URL, init?: RequestInit): Promise<Response> {
  const response = await ask(url, init);
  if (response.ok || response.status === 405) return response; // 405: the MCP server offers no stream
  const said = `${response.status} ${await quote(response)}`;
  throw response.status === 429 ? new CannotTell(`${said}: try again in a minute`) : new Error(said);
}

const isPage = ({ headers }: Response) => headers.get("content-type")?.startsWith("text/html") === true;

/** What an answer says that is not the one hoped for: a redirect, a page, or an error in one of the usual forms. */
async function quote(response: Response): Promise<string> {
  const location = response.headers.get("location");
  if (location !== null) return `redirect to ${location.split("?", 1)[0]}`;
  const body = await response.text();
  if (isPage(response)) {
    return `page "${textOf(body)}" ${response.headers.get("ngrok-error-code") ?? ""}`.trim();
  }
  try {
    const { error, error_description, message } = JSON.parse(body);
    return [error?.message ?? error, error_description ?? message].filter(Boolean).join(": ");
  } catch {
    return "not JSON";
  }
}

/** The visible text of a page, in one line. */
function textOf(html: string): string {
  return html.replace(/<(script|style)\b.*?<\/\1>|<[^>]*>/gs, " ").replace(/\s+/g, " ").trim();
}

async function readDocument<T>(url: string, schema: { parse(json: unknown): T }): Promise<T> {
  const response = await ask(url);
  if (response.status !== 200 || isPage(response)) {
    throw new Error(`${url} answers ${response.status} ${await quote(response)}, expected 200 and JSON`);
  }
  try {
    return schema.parse(await response.json());
  } catch (error) {
    throw new Error(`${url} is another document than expected: ${describeError(error)}`);
  }
}

// ------------------------------------------------------------------------------- the server, from outside

/** Calls the server without a token. */
const call = (serverUrl: string, headers: Record<string, string> = {}) =>
  ask(serverUrl, {
    method: "POST",
    headers: {
      "content-type": "application/json",
      "accept": "application/json, text/event-stream",
      ...headers,
    },
    body: JSON.stringify({ jsonrpc: "2.0", id: 1, method: "tools/list" }),
  });

export const reachServer: Run = async (found) => {
  const answer = await call(found.serverUrl);
  if (isPage(answer) || answer.status >= 500) {
    const question = answer.status === 502 ? `: does the tunnel point at PORT ${found.port}?` : "";
    throw new Error(
      `${found.serverUrl} answers ${answer.status} ${await quote(answer)}, expected JSON${question}`,
    );
  }
  found.answer = answer;
  return `${found.serverUrl} answers`;
};

export const expectHttps: Run = ({ serverUrl, issuer }) => {
  if (serverUrl.startsWith("https:")) return "yes";
  if (issuer.startsWith("http:")) return "not needed on loopback with a stand-in tenant";
  throw new Error(`found ${serverUrl}, expected https`);
};

export const expect401: Run = ({ answer }) => compare(String(need(answer, "the server").status), "401");

const need401 = ({ answer }: Found) => need(answer?.status === 401 ? answer : undefined, "the 401");

/** Without a token there is no error to name (RFC 6750 §3.1), and some hosts start no sign-in where one is named. */
export const readChallenge: Run = (found) => {
  const { resourceMetadataUrl, error } = oauth.extractWWWAuthenticateParams(need401(found));
  if (error !== undefined) throw new Error(`found error="${error}", expected none`);
  return compare(resourceMetadataUrl?.href, metadataUrl(found.serverUrl));
};

export const readMetadata: Run = async (found) => {
  need(found.answer, "the server");
  const { origin } = new URL(found.serverUrl);
  const url = metadataUrl(found.serverUrl);
  for (const address of [`${origin}/.well-known/oauth-protected-resource`, url]) {
    found.resource = await readDocument(address, schemas.OAuthProtectedResourceMetadataSchema);
  }
  return `${url}, and without the path`;
};

export const compareResource: Run = ({ resource, serverUrl }) =>
  compare(need(resource, "the metadata").resource, serverUrl);

export const compareTenant: Run = ({ resource, issuer }) =>
  compare(need(resource, "the metadata").authorization_servers?.join(" "), issuer);

export const expectNoCache: Run = async ({ resource, serverUrl }) => {
  need(resource, "the metadata");
  const { headers } = await ask(metadataUrl(serverUrl));
  const hit = ["age", "x-cache", "cf-cache-status"].find((name) => /^\d|hit/i.test(headers.get(name) ?? ""));
  if (hit !== undefined) throw new Error(`found ${hit}: ${headers.get(hit)}, expected none`);
  const cacheControl = headers.get("cache-control") ?? "none";
  if (!cacheControl.includes("no-store")) {
    throw new Error(`found Cache-Control: ${cacheControl}, expected no-store`);
  }
  return "none";
};

/** Clients that run in a browser ask first whether they may send these, as revision 2026-07-28 of MCP wants them. */
const BROWSER_HEADERS = "authorization,content-type,mcp-method,mcp-name,mcp-protocol-version";

export const callAsBrowser: Run = async (found) => {
  need401(found);
  const { serverUrl } = found;
  const origin = "https://chatgpt.com";
  const preflight = await ask(serverUrl, {
    method: "OPTIONS",
    headers: {
      origin,
      "access-control-request-method": "POST",
      "access-control-request-headers": BROWSER_HEADERS,
    },
  });
  const show = (method: string, { headers }: Response, status: number) =>
    `${method} ${status} for ${headers.get("access-control-allow-origin") ?? "nobody"}`;
  const posted = await call(serverUrl, { origin });
  compare(show("POST", posted, posted.status), `POST 401 for ${origin}`);
  compare(show("OPTIONS", preflight, preflight.ok ? 204 : preflight.status), `OPTIONS 204 for ${origin}`);
  const headers = preflight.headers.get("access-control-allow-headers")?.toLowerCase().split(/ *, */) ?? [];
  const refused = BROWSER_HEADERS.split(",").filter((name) => !headers.includes(name));
  if (refused.length > 0) throw new Error(`found no header ${refused.join(", ")} allowed, expected each`);
  return `${origin} is let in`;
};

/** Rules against bots turn away the hosts of ChatGPT and Claude, while curl and this doctor pass. */
export const callAsHosts: Run = async (found) => {
  need401(found);
  const agents = ["openai-mcp", "Claude-User"];
  const said = await Promise.all(agents.map(async (agent) => {
    const answer = await call(found.serverUrl, { "user-agent": agent });
    return answer.status === 401 ? "" : `${agent} gets ${answer.status} ${await quote(answer)}`;
  }));
  const refused = said.filter(Boolean).join(", ");
  if (refused !== "") throw new Error(`${refused}, expected 401 as for others`);
  return `${agents.join(" and ")} get the same answer`;
};

// ------------------------------------------------------------------------------------------- the tenant

export const readDiscovery: Run = async (found) => {
  const names = ["openid-configuration", "oauth-authorization-server"];
  for (const name of names) {
    found.tenant = await readDocument(`${found.issuer}.well-known/${name}`, schemas.OAuthMetadataSchema);
  }
  return names.join(" and ");
};

export const compareClock: Run = async ({ tenant, issuer }) => {
  need(tenant, "the tenant");
  const { headers } = await ask(`${issuer}.well-known/openid-configuration`);
  const sent = Date.parse(headers.get("date") ?? "");
  const seconds = Math.round((Date.now() - sent) / 1000) - Number(headers.get("age") ?? 0);
  if (Math.abs(seconds) > 60) {
    throw new Error(`found ${seconds} s between the tenant's and this, expected 60`);
  }
  return "right";
};

export const compareIssuer: Run = ({ tenant, issuer }) => compare(need(tenant, "the tenant").issuer, issuer);

export const expectS256: Run = ({ tenant }) => {
  const methods = need(tenant, "the tenant").code_challenge_methods_supported ?? [];
  return compare(methods.includes("S256") ? "S256" : methods.join(" "), "S256");
};

export const readSigningKeys: Run = async (found) => {
  need(found.tenant, "the tenant");
  const keySet = z.object({ keys: z.array(z.object({ kty: z.string(), alg: z.string().default("RS256") })) });
  const { keys } = await readDocument(`${found.issuer}.well-known/jwks.json`, keySet);
  const usable = keys.filter(({ kty, alg }) => kty === "RSA" && alg === "RS256");
  if (usable.length === 0) throw new Error(`found none for RS256 among ${keys.length}, expected one`);
  found.keys = usable.length;
  return `${usable.length} for RS256`;
};

const isIdentified = ({ tenant }: Found) =>
  need(tenant, "the tenant").authorization_response_iss_parameter_supported === true;

/** ChatGPT wants `iss` advertised by the issuer that the server's metadata names, to the last slash. */
const addressesOfChatGpt = (found: Found) => {
  const { authorization_servers: [named] = [] } = need(found.resource, "the metadata");
  return isIdentified(found) && named === found.tenant?.issuer ? STABLE : PER_CONNECTION;
};

export const tellIssuerIdentification: Run = (found) =>
  `${isIdentified(found) ? "on" : "off"}: ChatGPT's callback is ${addressesOfChatGpt(found).callback}`;

/** Whether registration is on does not show here: Auth0 publishes its endpoint in any case. */
export const tellCimd: Run = (found) =>
  need(found.tenant, "the tenant").client_id_metadata_document_supported
    ? `advertised: import ChatGPT's document, ${addressesOfChatGpt(found).document}`
    : "not advertised: ChatGPT registers itself, unless it is given a fixed application";

// ------------------------------------------------------------------------------------------- the client

/** A client's document is at its id and names its callbacks; a fixed application has to allow both of ChatGPT's. */
export const useClient: Run = async (found) => {
  const { client = "", tenant } = found;
  found.callback = STABLE.callback;
  if (URL.canParse(client)) {
    if (!need(tenant, "the tenant").client_id_metadata_document_supported) throw new Error("CIMD is off");
    const { redirect_uris: [callback] } = await readDocument(client, schemas.OAuthClientMetadataSchema);
    found.callback = need(callback, "a callback in the document");
  }
  found.clientInformation = { client_id: client };
  return `${client}, called back at ${found.callback}`;
};

/** Waits on loopback (RFC 8252 §7.3), and takes no answer but the one to its own question. */
async function listenForAnswer(state: string) {
  const server = createServer();
  const query = new Promise<URLSearchParams>((resolve) => {
    server.on("request", ({ url = "" }, response) => {
      const answer = new URLSearchParams(url.split("?", 2)[1]);
      const isOurs = answer.get("state") === state;
      response.writeHead(isOurs ? 200 : 404, { "connection": "close", "content-type": "text/plain" });
      response.end(isOurs ? "Go back to the terminal: this page can be closed.\n" : "Nothing is here.\n");
      if (isOurs) resolve(answer);
    });
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  return { url: `http://127.0.0.1:${port}/callback`, query, close: () => server.close() };
}

export const registerClient: Run = async (found) => {
  const metadata = need(found.tenant, "the tenant");
  found.listener = await listenForAnswer(found.state);
  const clientMetadata = {
    client_name: CLIENT_NAME,
    redirect_uris: [found.listener.url],
    grant_types: ["authorization_code", "refresh_token"],
    response_types: ["code"],
    token_endpoint_auth_method: "none",
  };
  try {
    const options = { metadata, clientMetadata, fetchFn: askForSuccess };
    const client = await oauth.registerClient(found.issuer, options);
    hide(found, client.client_secret);
    found.clientInformation = client;
    found.callback = found.listener.url;
    return `on. It created the application "${CLIENT_NAME}", ${client.client_id}: delete it afterwards`;
  } catch (error) {
    const isOff = /registration.*(disabled|not enabled)/i.test(describeError(error));
    const way = found.way ?? (metadata.client_id_metadata_document_supported ? "cimd" : "register");
    if (!isOff || way === "register") throw error;
    throw new CannotTell(`off, and the way ${way} needs none: look with --client at ChatGPT's client`);
  }
};

export const tellKind: Run = ({ clientInformation }) =>
  need(clientInformation, "a client").client_id.startsWith("tpc_")
    ? "strict, as the id hints (tpc_…): mind Default Permissions in Step 1, OIDC enabled in Step 7"
    : "permissive, as the id hints (no tpc_…): mind the Action in Step 4";

/** All that ChatGPT may ask for: what the tenant advertises, and what the server does. */
function scopesToAskFor({ tenant, resource }: Found): string[] {
  return [...new Set([...tenant?.scopes_supported ?? [], ...resource?.scopes_supported ?? []])].toSorted();
}

export const openSignInPage: Run = async (found) => {
  const authorization = await oauth.startAuthorization(found.issuer, {
    metadata: need(found.tenant, "the tenant"),
    clientInformation: need(found.clientInformation, "a client"),
    redirectUrl: need(found.callback, "a client"),
    scope: scopesToAskFor(found).join(" "),
    state: found.state,
    resource: found.serverUrl,
  });
  hide(found, authorization.codeVerifier);
  const said = await browse(authorization.authorizationUrl);
  if (findCause(said, found)) throw new Error(said);
  found.authorization = authorization; // even so, a browser may get further
  if (said !== "") throw new CannotTell(`${said}. The cause is the newest line in Monitoring → Logs`);
  return "opens";
};

/**
 * Goes to a page as a browser does, by way of redirects and with cookies.
 *
 * @returns Nothing where it ends on a page to sign in at, or else what it says there: Auth0 keeps errors of third-party
 *   clients on a page of its own, or hands them in the query to the tenant's.
 */
async function browse(url: URL): Promise<string> {
  const { origin } = url;
  const cookies: string[] = [];
  for (let hops = 0; hops < 10; hops++) {
    const error = url.searchParams.get("error");
    if (error !== null) return `${error}: ${url.searchParams.get("error_description")}`;
    if (url.origin !== origin) return ""; // at Google's, say
    const response = await ask(url, { headers: { cookie: cookies.join("; ") } });
    const location = response.headers.get("location");
    if (location === null) {
      const text = textOf(await response.text());
      return response.ok && !text.includes("something went wrong") ? "" : `${response.status} ${text}`;
    }
    cookies.push(...response.headers.getSetCookie().map((cookie) => cookie.replace(/;.*/, "")));
    url = new URL(location, url);
  }
  return "more than 10 redirects";
}

// -------------------------------------------------------------------------------------- tokens and tools

function keep(found: Found, { access_token, refresh_token, id_token }: schemas.OAuthTokens, token: Token) {
  hide(found, access_token, refresh_token, id_token);
  token.text = access_token;
}

export const requestToken: Run = async (found, token) => {
  const { id, secret, tenant, serverUrl: audience } = found;
  if (!id) throw new Error("AUTH0_CLIENT_ID is not set");
  if (!secret) throw new Error("AUTH0_CLIENT_SECRET is not set");
  // For this grant Auth0 wants its own `audience` in place of RFC 8707's `resource`.
  const request = { grant_type: "client_credentials", client_id: id, client_secret: secret, audience };
  const { token_endpoint } = need(tenant, "the tenant");
  const answer = await askForSuccess(token_endpoint, { method: "POST", body: new URLSearchParams(request) });
  keep(found, schemas.OAuthTokensSchema.parse(await answer.json()), token);
  return `issued to ${id}`;
};

export const signIn: Run = async (found) => {
  const { authorizationUrl } = need(found.authorization, "the sign-in page");
  const { query } = need(found.listener, "a client");
  found.print(`Open this in a browser, within ${SIGN_IN_MINUTES} minutes:\n\n${authorizationUrl}\n`);
  await found.openBrowser(authorizationUrl.href);
  const answer = await Promise.race([query, delay(SIGN_IN_MINUTES * 60_000, undefined, { ref: false })]);
  if (answer === undefined) throw new CannotTell(`nobody came back within ${SIGN_IN_MINUTES} minutes`);
  found.signedIn = answer;
  const code = answer.get("code");
  if (code === null) {
    const said = `${answer.get("error")}: ${answer.get("error_description")}`;
    throw findCause(said, found) ? new Error(said) : new CannotTell(said); // the user may have declined
  }
  hide(found, code);
  return "done";
};

/** Where it is advertised, clients refuse an answer that does not hold it (RFC 9207 §2.4). */
export const compareAnswer: Run = (found) => {
  const iss = need(found.signedIn, "the sign-in").get("iss");
  if (iss === null && !isIdentified(found)) return "none, and none is advertised";
  return compare(iss, need(found.tenant, "the tenant").issuer);
};

const grantOptions = ({ tenant, clientInformation, serverUrl }: Found) => ({
  metadata: need(tenant, "the tenant"),
  clientInformation: need(clientInformation, "a client"),
  resource: serverUrl,
  fetchFn: askForSuccess,
});

export const exchangeCode: Run = async (found, token) => {
  found.grant = await oauth.exchangeAuthorization(found.issuer, {
    ...grantOptions(found),
    authorizationCode: need(found.signedIn?.get("code") ?? undefined, "the sign-in"),
    codeVerifier: need(found.authorization, "the sign-in").codeVerifier,
    redirectUri: need(found.callback, "the sign-in"),
  });
  keep(found, found.grant, token);
  return "issued";
};

export const expectJwt: Run = (_, token) => {
  const text = need(token.text, "a token");
  const parts = text.split(".").length;
  if (parts === 5) throw new Error("found an encrypted one (JWE, 5 parts), expected a JWT of 3 parts");
  if (parts !== 3) throw new Error("found an opaque one, expected a JWT of 3 parts");
  token.jwt = text;
  const { alg, typ } = decodeProtectedHeader(text);
  return `JWT, alg ${alg}, typ ${typ}`;
};

/** Strict clients get none, whatever they ask for. */
export const tellIdToken: Run = ({ grant }) =>
  need(grant, "a token").id_token === undefined
    ? "none: the client is strict, untick OIDC enabled in Step 7"
    : "came: OIDC enabled in Step 7 can stay ticked";

/** ChatGPT compares what it asked for with what was granted. */
export const compareScopes: Run = (found) => {
  const { scope, id_token } = need(found.grant, "a token");
  const asked = scopesToAskFor(found);
  const granted = scope?.split(" ").toSorted() ?? asked; // RFC 6749 §5.1
  const refused = found.tenant?.scopes_supported?.filter((name) => !granted.includes(name)) ?? [];
  const sides = `asked    ${asked.join(" ")}\ngranted  ${granted.join(" ")}`;
  if (id_token === undefined) return `not for strict clients\n${sides}`;
  if (refused.length > 0) throw new Error(`not granted: ${refused.join(" ")}\n${sides}`);
  return `all granted\n${sides}`;
};

export const refresh: Run = async (found, token) => {
  const { refresh_token: refreshToken } = need(found.grant, "a token");
  if (refreshToken === undefined) throw new Error("found none, expected one");
  const renewed = await oauth.refreshAuthorization(found.issuer, { ...grantOptions(found), refreshToken });
  keep(found, renewed, token);
  return renewed.refresh_token === refreshToken ? "works" : "works, and is rotated";
};

/** As the server itself checks them. */
export const verifyClaims: Run = async ({ issuer, serverUrl, print, tenant, keys }, token) => {
  need(tenant?.issuer === issuer || undefined, "the issuer");
  need(keys, "the signing keys");
  const authenticate = createAuthenticator({ issuer, url: serverUrl, name: "", scopes: [] }, print);
  token.caller = await authenticate(`Bearer ${need(token.jwt, "a JWT")}`);
  const { exp, ...claims } = token.caller.claims;
  const lines = Object.entries({ ...claims, exp: new Date(Number(exp) * 1000).toISOString() })
    .flatMap(([name, value]) => value === undefined ? [] : [`${name.padEnd(13)}${value}`]);
  return ["right", ...lines].join("\n");
};

/** What the server asks clients to ask for, and is not one of the tenant's own. */
export const expectApiScopes: Run = ({ resource, tenant }, { caller }) => {
  const { scopes } = need(caller, "right claims");
  const { scopes_supported = [] } = need(resource, "the metadata");
  const needed = scopes_supported.filter((name) => !tenant?.scopes_supported?.includes(name));
  const lacking = needed.filter((name) => !scopes.has(name));
  if (lacking.length > 0) throw new Error(`found no ${lacking.join(" ")}, expected ${needed.join(" ")}`);
  return needed.join(" ") || "none needed without ENFORCE_SCOPES";
};

export const initialize: Run = async ({ answer, serverUrl }, token) => {
  need(answer, "the server");
  need(token.caller, "right claims");
  const mcp = new Client({ name: CLIENT_NAME, version: "1.0.0" });
  const transport = new StreamableHTTPClientTransport(new URL(serverUrl), {
    fetch: askForSuccess,
    requestInit: { headers: { authorization: `Bearer ${need(token.jwt, "a JWT")}` } },
  });
  await mcp.connect(transport, { timeout: TIMEOUT_MS });
  token.mcp = mcp;
  return `protocol ${transport.protocolVersion}`;
};

export const listTools: Run = async (_, { mcp }) => {
  const { tools } = await need(mcp, "initialize").listTools({}, { timeout: TIMEOUT_MS });
  return tools.map(({ name }) => name).join(", ");
};

export const getProfile: Run = async (_, { mcp }) => {
  const call = { name: "get_profile", arguments: {} };
  const result = await need(mcp, "initialize").callTool(call, undefined, { timeout: TIMEOUT_MS });
  if (result.isError || !result.structuredContent) throw new Error(JSON.stringify(result.content));
  return JSON.stringify(result.structuredContent);
};
