/** `npm run doctor`: looks at the tenant and at the running server from outside, as `HELP` says. */
import { spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { realpathSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import * as oauth from "@modelcontextprotocol/sdk/client/auth.js";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import * as schemas from "@modelcontextprotocol/sdk/shared/auth.js";
import { decodeProtectedHeader } from "jose";
import { z } from "zod";
import { createAuthenticator, metadataUrl, reason } from "../../auth.ts";
import type { Caller } from "../../auth.ts";
import { readSettings } from "../../server.ts";

const HELP = `Usage: npm run doctor -- [--register | --login]

Looks at the tenant and at the running server from outside, and names the step of the README that is missing.

  --register   create an application in the tenant, and go as far as the sign-in page
  --login      do that too, sign you in through your browser, and call the tools
  --help       show this

Reads the server's environment, and AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET of Step 6 where they are set.

Prints one line a check: ok, missing, or cannot tell where an earlier check failed or the answer does not show
from outside. Exits with 1 if something is missing. Tokens, codes and secrets are never printed.`;

const TIMEOUT_MS = 10_000;
const SIGN_IN_MINUTES = 5;
const CLIENT_NAME = "chatgpt-auth0-mcp doctor";

/** Says what it has found, and keeps it for the checks after it. Throws what is missing, or `CannotTell`. */
type Run = (found: Found, token: Token) => string | Promise<string>;
/** The remedy stands in the README under `heading`, or else under the step. */
type Check = [step: number, what: string, run: Run, remedy: string, heading?: string];

/** Every check, in the order in which the steps fail in the field. */
const sections = ({ register, login, id, secret }: Found): [title: string, checks: Check[]][] => [
  ["The server, from outside", [
    [0, "server", reachServer, "Start the server and the tunnel"],
    [0, "HTTPS", expectHttps, "ChatGPT calls from the internet: open a tunnel"],
    [0, "call without a token", expect401, "Compare the path of MCP_SERVER_URL with the running server's"],
    [0, "challenge", readChallenge, "A proxy changes it, or the server's MCP_SERVER_URL differs", "Deploy"],
    [0, "metadata", readMetadata, "Route /.well-known/oauth-protected-resource to the server too", "Deploy"],
    [0, "resource", compareResource, "The running server has another MCP_SERVER_URL: restart it"],
    [0, "authorization server", compareTenant, "The running server has another AUTH0_DOMAIN: restart it"],
    [0, "caches", expectNoCache, "Switch caching off for this host", "Deploy"],
    [0, "Origin and CORS", callAsChatGpt, "A proxy answers in the server's place", "Deploy"],
  ]],
  ["The tenant", [
    [0, "discovery", readDiscovery, "Compare AUTH0_DOMAIN with the tenant's domain"],
    [0, "issuer", compareIssuer, "Set AUTH0_DOMAIN to the domain users sign in at", "401 after a good login"],
    [0, "PKCE", expectS256, "AUTH0_DOMAIN must lead to Auth0 itself"],
    [0, "signing keys", readSigningKeys, "The server has to reach them as well", "503 Service Unavailable"],
    [2, "CIMD", tellCimd, ""],
  ]],
  [
    "A client that registers itself",
    !register ? skip(2, "npm run doctor -- --register creates one and looks") : [
      [2, "registration", registerClient, "Switch registration on", "Enable client registration"],
      [2, "kind of client", tellKind, ""],
      [3, "sign-in page", openSignInPage, "Read Monitoring → Logs", "Oops!, something went wrong"],
    ],
  ],
  [
    "A machine-to-machine token",
    !id && !secret ? skip(6, "AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET are not set") : [
      [6, "token", requestToken, "Compare the two settings, and authorize the application for the API"],
      [1, "kind of token", expectJwt, "Switch JSON Web Encryption (JWE) off", "API Settings"],
      ...tokenChecks(6),
    ],
  ],
  [
    "A user's token",
    !login ? skip(7, "npm run doctor -- --login signs you in and looks") : [
      [3, "sign-in", signIn, "Read Monitoring → Logs", "Oops!, something went wrong"],
      [1, "token", exchangeCode, "Set the Default Permissions", "API Settings"],
      [2, "kind of token", expectJwt, "Set the Default Audience"],
      [4, "OpenID Connect scopes", compareScopes, "Put the Action into the flow", "OAUTH_SCOPES_MISMATCH"],
      [1, "refresh token", refresh, "Switch Allow Offline Access on", "No refresh token"],
      ...tokenChecks(7),
    ],
  ],
];

const tokenChecks = (step: number): Check[] => [
  [1, "claims", verifyClaims, "Compare found and expected", "401 after a good login"],
  [1, "scopes of the API", expectApiScopes, "Grant the permissions", "Permissions per tool"],
  [step, "initialize", initialize, "The server says above what it expects", "401 after a good login"],
  [step, "tools/list", listTools, "Read the server's log", "ChatGPT shows no tools, or old ones"],
  [step, "get_profile", getProfile, "Read the server's log", "ChatGPT shows no tools, or old ones"],
];

const skip = (step: number, why: string): Check[] => [
  [step, "not checked", () => Promise.reject(new CannotTell(why)), ""],
];

/** Words of Auth0's that name another step than the one at hand, and are headings of the README's troubleshooting. */
const CAUSES: [words: RegExp, step: number, remedy: string][] = [
  [
    /You reached the limit of entities of this type for this tenant/,
    2,
    "Delete what failed attempts have left",
  ],
  [/no connections enabled for the client/, 3, "Promote a connection to domain level"],
  [/Service not found(?=: MCP_SERVER_URL(?!\S))/, 1, "Create an API with this Identifier"],
  // Not what was asked for, so it is what the tenant has put in its place.
  [/Service not found/, 2, "The Default Audience must equal MCP_SERVER_URL"],
  [/is not authorized to access resource server/, 1, "Set the Default Permissions"],
];

type Environment = Record<string, string | undefined>;

export interface Options {
  register?: boolean | undefined;
  login?: boolean | undefined;
}

/** What there is to begin with, and what the checks have found for those after them. */
interface Found extends Options {
  serverUrl: string;
  issuer: string;
  /** AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET. */
  id: string | undefined;
  secret: string | undefined;
  openBrowser: (url: string) => void | Promise<void>;
  print: (text: string) => void;
  /** What is hidden wherever it is quoted. */
  secrets: Set<string>;
  answer?: Response;
  resource?: schemas.OAuthProtectedResourceMetadata;
  tenant?: schemas.OAuthMetadata;
  callback?: Awaited<ReturnType<typeof startCallback>>;
  client?: schemas.OAuthClientInformationFull;
  authorization?: { authorizationUrl: URL; codeVerifier: string };
  code?: string;
  grant?: schemas.OAuthTokens;
}

/** The access token of a section, and what has been found of it. */
interface Token {
  text?: string;
  jwt?: string;
  caller?: Caller;
  mcp?: Client;
}

class CannotTell extends Error {}

/** What an earlier check has found. */
function need<T>(value: T | undefined, name: string): T {
  if (value === undefined) throw new CannotTell(`not checked, since it needs ${name}`);
  return value;
}

function compare(found: string | null | undefined, expected: string): string {
  if (found !== expected) throw new Error(`found ${found || "none"}, expected ${expected}`);
  return expected;
}

/** @returns The step, the remedy and the heading. */
function findCause(
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
    throw new Error(`${String(url).split("?", 1)[0]} cannot be reached: ${reason(error)}`);
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
    throw new Error(`${url} is another document than expected: ${reason(error)}`);
  }
}

// ------------------------------------------------------------------------------- the server, from outside

const CALL = {
  method: "POST",
  headers: { "content-type": "application/json", "accept": "application/json, text/event-stream" },
  body: JSON.stringify({ jsonrpc: "2.0", id: 1, method: "tools/list" }),
};

const reachServer: Run = async (found) => {
  const answer = await ask(found.serverUrl, CALL);
  if (isPage(answer) || answer.status >= 500) {
    throw new Error(`${found.serverUrl} answers ${answer.status} ${await quote(answer)}, expected JSON`);
  }
  found.answer = answer;
  return `${found.serverUrl} answers`;
};

const expectHttps: Run = ({ serverUrl, issuer }) => {
  if (serverUrl.startsWith("https:")) return "yes";
  if (issuer.startsWith("http:")) return "not needed on loopback with a stand-in tenant";
  throw new Error(`found ${serverUrl}, expected https`);
};

const expect401: Run = ({ answer }) => compare(String(need(answer, "the server").status), "401");

/** Without a token there is no error to name (RFC 6750 §3.1), and some hosts start no sign-in where one is named. */
const readChallenge: Run = ({ answer, serverUrl }) => {
  const { resourceMetadataUrl, error } = oauth.extractWWWAuthenticateParams(need(answer, "the server"));
  if (error !== undefined) throw new Error(`found error="${error}", expected none`);
  return compare(resourceMetadataUrl?.href, metadataUrl(serverUrl));
};

const readMetadata: Run = async (found) => {
  need(found.answer, "the server");
  const { origin } = new URL(found.serverUrl);
  const url = metadataUrl(found.serverUrl);
  for (const address of [`${origin}/.well-known/oauth-protected-resource`, url]) {
    found.resource = await readDocument(address, schemas.OAuthProtectedResourceMetadataSchema);
  }
  return `${url}, and without the path`;
};

const compareResource: Run = ({ resource, serverUrl }) =>
  compare(need(resource, "the metadata").resource, serverUrl);

const compareTenant: Run = ({ resource, issuer }) =>
  compare(need(resource, "the metadata").authorization_servers?.join(" "), issuer);

const expectNoCache: Run = async ({ resource, serverUrl }) => {
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

const callAsChatGpt: Run = async ({ answer, serverUrl }) => {
  need(answer, "the server");
  const origin = "https://chatgpt.com";
  const call = await ask(serverUrl, { ...CALL, headers: { ...CALL.headers, origin } });
  const preflight = await ask(serverUrl, {
    method: "OPTIONS",
    headers: {
      origin,
      "access-control-request-method": "POST",
      "access-control-request-headers": "authorization",
    },
  });
  const allowed = ({ headers }: Response) => `for ${headers.get("access-control-allow-origin") ?? "nobody"}`;
  compare(`POST ${call.status} ${allowed(call)}`, `POST 401 for ${origin}`);
  compare(
    `OPTIONS ${preflight.ok ? 204 : preflight.status} ${allowed(preflight)}`,
    `OPTIONS 204 for ${origin}`,
  );
  return `${origin} is let in`;
};

// ------------------------------------------------------------------------------------------- the tenant

const readDiscovery: Run = async (found) => {
  const names = ["openid-configuration", "oauth-authorization-server"];
  for (const name of names) {
    found.tenant = await readDocument(`${found.issuer}.well-known/${name}`, schemas.OAuthMetadataSchema);
  }
  return names.join(" and ");
};

const compareIssuer: Run = ({ tenant, issuer }) => compare(need(tenant, "the tenant").issuer, issuer);

const expectS256: Run = ({ tenant }) => {
  const methods = need(tenant, "the tenant").code_challenge_methods_supported ?? [];
  return compare(methods.includes("S256") ? "S256" : methods.join(" "), "S256");
};

const readSigningKeys: Run = async ({ tenant, issuer }) => {
  need(tenant, "the tenant");
  const keySet = z.object({ keys: z.array(z.object({ kty: z.string(), alg: z.string().default("RS256") })) });
  const { keys } = await readDocument(`${issuer}.well-known/jwks.json`, keySet);
  const usable = keys.filter(({ kty, alg }) => kty === "RSA" && alg === "RS256");
  if (usable.length === 0) throw new Error(`found none for RS256 among ${keys.length}, expected one`);
  return `${usable.length} for RS256`;
};

/** Whether registration is on does not show here: Auth0 publishes its endpoint in any case. */
const tellCimd: Run = ({ tenant }) =>
  need(tenant, "the tenant").client_id_metadata_document_supported
    ? "advertised: ChatGPT uses it, and its URL has to be imported"
    : "not advertised: ChatGPT registers itself";

// ------------------------------------------------------------------------ a client that registers itself

/** Waits on loopback (RFC 8252 §7.3), and takes no answer but the one to its own question. */
async function startCallback() {
  const state = randomUUID();
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
  return { url: `http://127.0.0.1:${port}/callback`, state, query, close: () => server.close() };
}

const registerClient: Run = async (found) => {
  const metadata = need(found.tenant, "the tenant");
  found.print(`This creates the application "${CLIENT_NAME}" in ${found.issuer}: delete it afterwards.`);
  found.callback = await startCallback();
  const clientMetadata = {
    client_name: CLIENT_NAME,
    redirect_uris: [found.callback.url],
    grant_types: ["authorization_code", "refresh_token"],
    response_types: ["code"],
    token_endpoint_auth_method: "none",
  };
  try {
    found.client = await oauth.registerClient(found.issuer, {
      metadata,
      clientMetadata,
      fetchFn: askForSuccess,
    });
  } catch (error) {
    const isOff = /registration.*(disabled|not enabled)/i.test(reason(error));
    if (!isOff || !metadata.client_id_metadata_document_supported) throw error;
    throw new CannotTell("off, and CIMD is on: whether ChatGPT's URL is imported shows only there");
  }
  hide(found, found.client.client_secret);
  return `on, client id ${found.client.client_id}`;
};

const isStrict = ({ client }: Found) => need(client, "a client").client_id.startsWith("tpc_");

const tellKind: Run = (found) =>
  isStrict(found)
    ? "strict (tpc_…): mind Default Permissions in Step 1, OIDC enabled in Step 7"
    : "permissive (no tpc_…): mind the Action in Step 4";

/** All that ChatGPT may ask for: what the tenant advertises, and what the server does. */
function scopesToAskFor({ tenant, resource }: Found): string[] {
  return [...new Set([...tenant?.scopes_supported ?? [], ...resource?.scopes_supported ?? []])].toSorted();
}

const openSignInPage: Run = async (found) => {
  const clientInformation = need(found.client, "a client");
  const { url: redirectUrl, state } = need(found.callback, "a client");
  const authorization = await oauth.startAuthorization(found.issuer, {
    metadata: need(found.tenant, "the tenant"),
    clientInformation,
    redirectUrl,
    scope: scopesToAskFor(found).join(" "),
    state,
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

const requestToken: Run = async (found, token) => {
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

const signIn: Run = async (found) => {
  const { authorizationUrl } = need(found.authorization, "the sign-in page");
  const { query } = need(found.callback, "a client");
  found.print(`Open this in a browser, within ${SIGN_IN_MINUTES} minutes:\n\n${authorizationUrl}\n`);
  await found.openBrowser(authorizationUrl.href);
  const answer = await Promise.race([query, delay(SIGN_IN_MINUTES * 60_000, undefined, { ref: false })]);
  if (answer === undefined) throw new CannotTell(`nobody came back within ${SIGN_IN_MINUTES} minutes`);
  const code = answer.get("code");
  if (code === null) {
    const said = `${answer.get("error")}: ${answer.get("error_description")}`;
    throw findCause(said, found) ? new Error(said) : new CannotTell(said); // the user may have declined
  }
  hide(found, found.code = code);
  return "done";
};

const grantOptions = ({ tenant, client, serverUrl }: Found) => ({
  metadata: need(tenant, "the tenant"),
  clientInformation: need(client, "a client"),
  resource: serverUrl,
  fetchFn: askForSuccess,
});

const exchangeCode: Run = async (found, token) => {
  found.grant = await oauth.exchangeAuthorization(found.issuer, {
    ...grantOptions(found),
    authorizationCode: need(found.code, "the sign-in"),
    codeVerifier: need(found.authorization, "the sign-in").codeVerifier,
    redirectUri: need(found.callback, "the sign-in").url,
  });
  keep(found, found.grant, token);
  return "issued";
};

const expectJwt: Run = (_, token) => {
  const text = need(token.text, "a token");
  const parts = text.split(".").length;
  if (parts === 5) throw new Error("found an encrypted one (JWE, 5 parts), expected a JWT of 3 parts");
  if (parts !== 3) throw new Error("found an opaque one, expected a JWT of 3 parts");
  token.jwt = text;
  const { alg, typ } = decodeProtectedHeader(text);
  return `JWT, alg ${alg}, typ ${typ}`;
};

/** ChatGPT compares what it asked for with what was granted. */
const compareScopes: Run = (found) => {
  const { scope } = need(found.grant, "a token");
  const asked = scopesToAskFor(found);
  const granted = scope?.split(" ").toSorted() ?? asked; // RFC 6749 §5.1
  const refused = found.tenant?.scopes_supported?.filter((name) => !granted.includes(name)) ?? [];
  const sides = `asked    ${asked.join(" ")}\ngranted  ${granted.join(" ")}`;
  if (isStrict(found)) return `not for strict clients: mind OIDC enabled in Step 7\n${sides}`;
  if (refused.length > 0) throw new Error(`not granted: ${refused.join(" ")}\n${sides}`);
  return `all granted\n${sides}`;
};

const refresh: Run = async (found, token) => {
  const { refresh_token: refreshToken } = need(found.grant, "a token");
  if (refreshToken === undefined) throw new Error("found none, expected one");
  const renewed = await oauth.refreshAuthorization(found.issuer, { ...grantOptions(found), refreshToken });
  keep(found, renewed, token);
  return renewed.refresh_token === refreshToken ? "works" : "works, and is rotated";
};

/** As the server itself checks them. */
const verifyClaims: Run = async ({ issuer, serverUrl, print }, token) => {
  const authenticate = createAuthenticator({ issuer, audience: serverUrl, warn: print });
  token.caller = await authenticate(`Bearer ${need(token.jwt, "a JWT")}`);
  const { exp, ...claims } = token.caller.claims;
  const lines = Object.entries({ ...claims, exp: new Date(Number(exp) * 1000).toISOString() })
    .flatMap(([name, value]) => value === undefined ? [] : [`${name.padEnd(13)}${value}`]);
  return ["right", ...lines].join("\n");
};

/** What the server asks clients to ask for, and is not one of the tenant's own. */
const expectApiScopes: Run = ({ resource, tenant }, { caller }) => {
  const { scopes } = need(caller, "right claims");
  const { scopes_supported = [] } = need(resource, "the metadata");
  const needed = scopes_supported.filter((name) => !tenant?.scopes_supported?.includes(name));
  const lacking = needed.filter((name) => !scopes.has(name));
  if (lacking.length > 0) throw new Error(`found no ${lacking.join(" ")}, expected ${needed.join(" ")}`);
  return needed.join(" ") || "none needed without ENFORCE_SCOPES";
};

const initialize: Run = async ({ answer, serverUrl }, token) => {
  need(answer, "the server");
  const mcp = new Client({ name: CLIENT_NAME, version: "1.0.0" });
  const transport = new StreamableHTTPClientTransport(new URL(serverUrl), {
    fetch: askForSuccess,
    requestInit: { headers: { authorization: `Bearer ${need(token.jwt, "a JWT")}` } },
  });
  await mcp.connect(transport, { timeout: TIMEOUT_MS });
  token.mcp = mcp;
  return `protocol ${transport.protocolVersion}`;
};

const listTools: Run = async (_, { mcp }) => {
  const { tools } = await need(mcp, "initialize").listTools({}, { timeout: TIMEOUT_MS });
  return tools.map(({ name }) => name).join(", ");
};

const getProfile: Run = async (_, { mcp }) => {
  const call = { name: "get_profile", arguments: {} };
  const result = await need(mcp, "initialize").callTool(call, undefined, { timeout: TIMEOUT_MS });
  if (result.isError || !result.structuredContent) throw new Error(JSON.stringify(result.content));
  return JSON.stringify(result.structuredContent);
};

// ---------------------------------------------------------------------------------------------- the run

function hide({ secrets }: Pick<Found, "secrets">, ...texts: (string | undefined)[]): void {
  for (const text of texts) if (text) secrets.add(text);
}

/** Leaves secrets out, whoever has quoted them, and terminal codes: words come from outside. */
function clean(text: string, secrets: Set<string>): string {
  const hidden = [...secrets].reduce((rest, secret) => rest.replaceAll(secret, "(hidden)"), text);
  return hidden.replace(/[^\P{Cc}\n]/gu, "?");
}

/** @returns The step that is missing, if one is. */
async function perform(
  [step, what, run, remedy, heading = `Step ${step}`]: Check,
  found: Found,
  token: Token,
) {
  function printCheck(status: string, step: number, text: string): void {
    found.print(`${status.padEnd(13)}Step ${step}  ${text.replaceAll("\n", `\n${" ".repeat(21)}`)}`);
  }
  try {
    printCheck("ok", step, `${what}: ${await run(found, token)}`);
  } catch (error) {
    // Cleaned before it is cut, or half a secret would be left.
    const said = clean(`${what}: ${error instanceof Error ? error.message : error}`, found.secrets).slice(
      0,
      700,
    );
    if (error instanceof CannotTell) return printCheck("cannot tell", step, said);
    const [causingStep, mend, where] = findCause(said, found) ?? [step, remedy, heading];
    const [, named = causingStep] = /README Step (\d)/.exec(said) ?? []; // as auth.ts says it
    printCheck("missing", Number(named), `${said}\n${mend}. README, "${where}"`);
    return Number(named);
  }
}

/**
 * @param env AUTH0_DOMAIN and MCP_SERVER_URL as the server reads them, and what else `HELP` names.
 * @param print Takes a line, or several.
 * @param openBrowser Shows the user a page. Where it cannot, the URL that was printed has to do.
 * @returns The exit status.
 * @throws {Error} What is wrong with the environment, in the server's words.
 */
export async function doctor(
  env: Environment,
  { login, register = login }: Options,
  print: (text: string) => void,
  openBrowser: Found["openBrowser"],
): Promise<number> {
  const { AUTH0_CLIENT_ID: id, AUTH0_CLIENT_SECRET: secret } = env;
  const { serverUrl, issuer } = readSettings(env);
  const found: Found = {
    serverUrl,
    issuer,
    id,
    secret,
    register,
    login,
    openBrowser,
    print: (text) => print(clean(text, found.secrets)),
    secrets: new Set(),
  };
  hide(found, secret);

  const missing: number[] = [];
  for (const [title, checks] of sections(found)) {
    print(`\n${title}`);
    const token: Token = {};
    for (const check of checks) {
      const step = await perform(check, found, token);
      if (step !== undefined) missing.push(step);
    }
    await token.mcp?.close();
  }
  found.callback?.close();
  const [first] = missing;
  print(
    first === undefined
      ? "\nNothing is missing, as far as was checked."
      : `\n${missing.length} missing: start with Step ${first}.`,
  );
  return first === undefined ? 0 : 1;
}

/** A convenience: where there is no browser, the printed URL has to do. */
function openBrowser(url: string): void {
  const commands: Partial<Record<NodeJS.Platform, [string, ...string[]]>> = {
    darwin: ["open"],
    win32: ["rundll32", "url.dll,FileProtocolHandler"], // `start` is the shell's, which splits a URL at each `&`
  };
  const [command, ...args] = commands[process.platform] ?? ["xdg-open"];
  const browser = spawn(command, [...args, url], { stdio: "ignore", detached: true });
  browser.on("spawn", () => browser.unref());
  browser.on("error", () => {});
}

async function main(): Promise<number> {
  const { values: { help, ...options } } = parseArgs({
    options: { register: { type: "boolean" }, login: { type: "boolean" }, help: { type: "boolean" } },
  });
  if (help) {
    console.log(HELP);
    return 0;
  }
  try {
    process.loadEnvFile();
  } catch {
    // No .env: the environment alone, then.
  }
  return await doctor(process.env, options, console.log, openBrowser);
}

if (process.argv[1] !== undefined && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  process.exitCode = await main().catch((error: unknown) => {
    console.error(error instanceof Error ? error.message : error);
    return 1;
  });
}
