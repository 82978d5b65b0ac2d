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
import { type Caller, createAuthenticator, describeError, metadataUrl } from "../../../auth.ts";
import type { Print } from "../command.ts";
import { CannotTell, type Finding } from "./findings.ts";
import type { Way } from "../../support/tenant.ts";

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

/** Of the MCP server. */
type ResourceMetadata = schemas.OAuthProtectedResourceMetadata;
/** Of the tenant. Only `compareIssuer` gives it to the checks after it. */
type TenantMetadata = schemas.OAuthMetadata;

export function compare(found: string | null | undefined, expected: string): string {
  if (found !== expected) throw new Error(`found ${found || "none"}, expected ${expected}`);
  return expected;
}

// --------------------------------------------------------------------------------------------- requests

/** `fetch` with a time-out, which follows no redirect. */
async function send(url: string | URL, init: RequestInit = {}): Promise<Response> {
  try {
    const signals = [AbortSignal.timeout(TIMEOUT_MS), ...(init.signal ? [init.signal] : [])]; // the SDK sends its own
    return await fetch(url, { ...init, signal: AbortSignal.any(signals), redirect: "manual" });
  } catch (error) {
    throw new Error(`${String(url).split("?", 1)[0]} cannot be reached: ${describeError(error)}`);
  }
}

/** The same for the SDK, whose own errors leave out the status and any body that is not in OAuth's form. */
async function sendExpectingSuccess(url: string | URL, init?: RequestInit): Promise<Response> {
  const response = await send(url, init);
  if (response.ok || response.status === 405) return response; // 405: the MCP server offers no stream
  const said = `${response.status} ${await quote(response)}`;
  throw response.status === 429 ? new CannotTell(`${said}: try again in a minute`) : new Error(said);
}

const isPage = ({ headers }: Response) => headers.get("content-type")?.startsWith("text/html") === true;

/** What an unexpected answer says: a redirect, a page, or an error in one of the usual forms. */
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

/** The visible text of a page, in one line. Reads the page once, since it can be of any size. */
function textOf(html: string): string {
  let end = ""; // the tag that ends the current script or style
  const texts = html.split("<").map((part) => {
    const [tag = ""] = /^\/?\w*/.exec(part.slice(0, 10).toLowerCase()) ?? [];
    if (end === "" && (tag === "script" || tag === "style")) end = `/${tag}`;
    else if (tag === end) end = "";
    return end === "" ? part.slice(part.indexOf(">") + 1) : "";
  });
  return texts.join(" ").replace(/\s+/g, " ").trim();
}

async function readDocument<T>(url: string, schema: { parse(json: unknown): T }): Promise<T> {
  const response = await send(url);
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

/** Sends `tools/list` without a token. */
const postWithoutToken = (serverUrl: string, headers: Record<string, string> = {}) =>
  send(serverUrl, {
    method: "POST",
    headers: { "content-type": "application/json", "accept": "application/json, text/event-stream", ...headers },
    body: JSON.stringify({ jsonrpc: "2.0", id: 1, method: "tools/list" }),
  });

export async function reachServer(serverUrl: string, port: number): Promise<Finding<Response>> {
  const answer = await postWithoutToken(serverUrl);
  if (isPage(answer) || answer.status >= 500) {
    const question = answer.status === 502 ? `: does the tunnel point at PORT ${port}?` : "";
    throw new Error(`${serverUrl} answers ${answer.status} ${await quote(answer)}, expected JSON${question}`);
  }
  return { said: `${serverUrl} answers`, given: answer };
}

export function expectHttps(serverUrl: string, issuer: string): string {
  if (serverUrl.startsWith("https:")) return "yes";
  if (issuer.startsWith("http:")) return "not needed on loopback with a stand-in tenant";
  throw new Error(`found ${serverUrl}, expected https`);
}

export const expect401 = (answer: Response) => ({ said: compare(String(answer.status), "401"), given: answer });

/** Without a token there is no error to name (RFC 6750 §3.1), and some hosts start no sign-in where one is named. */
export function readChallenge(refusal: Response, serverUrl: string): string {
  const { resourceMetadataUrl, error } = oauth.extractWWWAuthenticateParams(refusal);
  if (error !== undefined) throw new Error(`found error="${error}", expected none`);
  return compare(resourceMetadataUrl?.href, metadataUrl(serverUrl));
}

export async function readMetadata(url: string): Promise<Finding<ResourceMetadata>> {
  return { said: url, given: await readDocument(url, schemas.OAuthProtectedResourceMetadataSchema) };
}

export async function expectNoCache(serverUrl: string): Promise<string> {
  const { headers } = await send(metadataUrl(serverUrl));
  const hit = ["age", "x-cache", "cf-cache-status"].find((name) => /^\d|hit/i.test(headers.get(name) ?? ""));
  if (hit !== undefined) throw new Error(`found ${hit}: ${headers.get(hit)}, expected none`);
  const cacheControl = headers.get("cache-control") ?? "none";
  if (!cacheControl.includes("no-store")) throw new Error(`found Cache-Control: ${cacheControl}, expected no-store`);
  return "none";
}

/** Headers that a browser's preflight asks for, those that MCP 2026-07-28 adds among them. */
const BROWSER_HEADERS = "authorization,content-type,mcp-method,mcp-name,mcp-protocol-version";

export async function callAsBrowser(serverUrl: string): Promise<string> {
  const origin = "https://chatgpt.com";
  const preflight = await send(serverUrl, {
    method: "OPTIONS",
    headers: { origin, "access-control-request-method": "POST", "access-control-request-headers": BROWSER_HEADERS },
  });
  const show = (method: string, { headers }: Response, status: number) =>
    `${method} ${status} for ${headers.get("access-control-allow-origin") ?? "nobody"}`;
  const posted = await postWithoutToken(serverUrl, { origin });
  compare(show("POST", posted, posted.status), `POST 401 for ${origin}`);
  compare(show("OPTIONS", preflight, preflight.ok ? 204 : preflight.status), `OPTIONS 204 for ${origin}`);
  const headers = preflight.headers.get("access-control-allow-headers")?.toLowerCase().split(/ *, */) ?? [];
  const refused = BROWSER_HEADERS.split(",").filter((name) => !headers.includes(name));
  if (refused.length > 0) throw new Error(`found no header ${refused.join(", ")} allowed, expected each`);
  return `${origin} is let in`;
}

/** Bot rules block the hosts of ChatGPT and Claude, while curl and this doctor get through. */
export async function callAsHosts(serverUrl: string): Promise<string> {
  const agents = ["openai-mcp", "Claude-User"];
  const said = await Promise.all(agents.map(async (agent) => {
    const answer = await postWithoutToken(serverUrl, { "user-agent": agent });
    return answer.status === 401 ? "" : `${agent} gets ${answer.status} ${await quote(answer)}`;
  }));
  const refused = said.filter(Boolean).join(", ");
  if (refused !== "") throw new Error(`${refused}, expected 401 as for others`);
  return `${agents.join(" and ")} get the same answer`;
}

// ------------------------------------------------------------------------------------------- the tenant

export async function readDiscovery(issuer: string): Promise<Finding<TenantMetadata>> {
  await readDocument(`${issuer}.well-known/openid-configuration`, schemas.OAuthMetadataSchema);
  const url = `${issuer}.well-known/oauth-authorization-server`;
  const metadata = await readDocument(url, schemas.OAuthMetadataSchema);
  return { said: "openid-configuration and oauth-authorization-server", given: metadata };
}

export async function compareClock(issuer: string): Promise<string> {
  const { headers } = await send(`${issuer}.well-known/openid-configuration`);
  const sent = Date.parse(headers.get("date") ?? "");
  const seconds = Math.round((Date.now() - sent) / 1000) - Number(headers.get("age") ?? 0);
  if (Math.abs(seconds) > 60) throw new Error(`found ${seconds} s between the tenant's and this, expected 60`);
  return "right";
}

/** A document whose issuer differs must not be used (RFC 8414 §3.3): its endpoints would be sent secrets. */
export function compareIssuer(metadata: TenantMetadata, issuer: string): Finding<TenantMetadata> {
  return { said: compare(metadata.issuer, issuer), given: metadata };
}

export function expectS256({ code_challenge_methods_supported: methods = [] }: TenantMetadata): string {
  return compare(methods.includes("S256") ? "S256" : methods.join(" "), "S256");
}

export async function readSigningKeys(issuer: string): Promise<Finding<unknown[]>> {
  const keySet = z.object({ keys: z.array(z.object({ kty: z.string(), alg: z.string().default("RS256") })) });
  const { keys } = await readDocument(`${issuer}.well-known/jwks.json`, keySet);
  const usable = keys.filter(({ kty, alg }) => kty === "RSA" && alg === "RS256");
  if (usable.length === 0) throw new Error(`found none for RS256 among ${keys.length}, expected one`);
  return { said: `${usable.length} for RS256`, given: usable };
}

/** Whether Include Issuer in Authorization Responses is on. */
const promisesIssuer = (tenant: TenantMetadata) => tenant.authorization_response_iss_parameter_supported === true;

/** ChatGPT compares the issuer that advertises `iss` with the one in the server's metadata, to the last slash. */
function addressesOfChatGpt(tenant: TenantMetadata, { authorization_servers: [named] = [] }: ResourceMetadata) {
  return promisesIssuer(tenant) && named === tenant.issuer ? STABLE : PER_CONNECTION;
}

export function tellIssuerIdentification(tenant: TenantMetadata, resource: ResourceMetadata): string {
  const { callback } = addressesOfChatGpt(tenant, resource);
  return `${promisesIssuer(tenant) ? "on" : "off"}: ChatGPT's callback is ${callback}`;
}

/** Whether registration is on does not show here: Auth0 publishes its endpoint in any case. */
export const tellCimd = (tenant: TenantMetadata, resource: ResourceMetadata) =>
  tenant.client_id_metadata_document_supported
    ? `advertised: import ChatGPT's document, ${addressesOfChatGpt(tenant, resource).document}`
    : "not advertised: ChatGPT registers itself, unless it is given a fixed application";

// ------------------------------------------------------------------------------------------- the client

/** A client of the tenant, and where its users are sent back to. */
export interface TenantClient {
  clientInformation: { client_id: string; client_secret?: string | undefined };
  callback: string;
}

/** ChatGPT's document, which is at its id and names its callback. */
export async function useDocument(url: string, tenant: TenantMetadata): Promise<Finding<TenantClient>> {
  if (!tenant.client_id_metadata_document_supported) throw new Error("CIMD is off");
  const { redirect_uris: [callback] } = await readDocument(url, schemas.OAuthClientMetadataSchema);
  if (callback === undefined) throw new Error("found no callback in the document, expected one");
  return { said: `${url}, called back at ${callback}`, given: { clientInformation: { client_id: url }, callback } };
}

/** An application that is given to ChatGPT, whose callback it has to allow. */
export function useApplication(
  client_id: string,
  given: string | undefined,
  tenant: TenantMetadata,
  resource: ResourceMetadata,
): Finding<TenantClient> {
  const { callback } = addressesOfChatGpt(tenant, resource);
  if (given === undefined && callback !== STABLE.callback) {
    throw new CannotTell(`Include Issuer is off: ChatGPT's callback is ${callback}. Pass it with --callback`);
  }
  const used = given ?? callback;
  return { said: `${client_id}, called back at ${used}`, given: { clientInformation: { client_id }, callback: used } };
}

/** Waits on loopback (RFC 8252 §7.3) for the answer with this state, and takes no other. */
export async function listenForAnswer(state: string) {
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
  return { url: `http://127.0.0.1:${port}/callback`, query, close: () => server.close().closeAllConnections() };
}

/** @param way How ChatGPT becomes a client, where that is known. */
export async function registerClient(tenant: TenantMetadata, callback: string, way?: Way) {
  const clientMetadata = {
    client_name: CLIENT_NAME,
    redirect_uris: [callback],
    grant_types: ["authorization_code", "refresh_token"],
    response_types: ["code"],
    token_endpoint_auth_method: "none",
  };
  try {
    const options = { metadata: tenant, clientMetadata, fetchFn: sendExpectingSuccess };
    const clientInformation = await oauth.registerClient(tenant.issuer, options);
    const said =
      `on. It created the application "${CLIENT_NAME}", ${clientInformation.client_id}: delete it afterwards`;
    return { said, given: { clientInformation, callback }, secrets: [clientInformation.client_secret] };
  } catch (error) {
    const said = describeError(error); // two expressions, since one for both would take quadratic time
    const isOff = /registration/i.test(said) && /disabled|not enabled/i.test(said);
    const used = way ?? (tenant.client_id_metadata_document_supported ? "cimd" : "register");
    if (!isOff || used === "register") throw error;
    throw new CannotTell(`off, and the way ${used} needs none: look with --client at ChatGPT's client`);
  }
}

export const tellKind = ({ clientInformation }: TenantClient) =>
  clientInformation.client_id.startsWith("tpc_")
    ? "strict, as the id hints (tpc_…): mind Default Permissions in Step 1, OIDC enabled in Step 7"
    : "permissive, as the id hints (no tpc_…): mind the Action in Step 4";

/** All scopes that ChatGPT may ask for: those that the tenant advertises, and those of the server's metadata. */
export function scopesToAskFor(tenant: TenantMetadata, resource: ResourceMetadata): string[] {
  return [...new Set([...tenant.scopes_supported ?? [], ...resource.scopes_supported ?? []])].toSorted();
}

export type Authorization = Awaited<ReturnType<typeof oauth.startAuthorization>>;

export async function openSignInPage(
  metadata: TenantMetadata,
  { clientInformation, callback: redirectUrl }: TenantClient,
  request: { scope: string; state: string; resource: string },
): Promise<Finding<Authorization>> {
  const options = { ...request, metadata, clientInformation, redirectUrl };
  const authorization = await oauth.startAuthorization(metadata.issuer, options);
  const said = await browse(authorization.authorizationUrl);
  const secrets = [authorization.codeVerifier];
  return { said: said || "opens", given: authorization, secrets, isUnclear: said !== "" };
}

/**
 * Opens a page as a browser does, with redirects and cookies.
 *
 * @returns "" where it ends on a sign-in page, or else the error: Auth0 shows errors of third-party clients on its own
 *   page, or passes them in the query to the tenant's.
 */
async function browse(url: URL): Promise<string> {
  const { origin } = url;
  const cookies: string[] = [];
  for (let hops = 0; hops < 10; hops++) {
    const error = url.searchParams.get("error");
    if (error !== null) return `${error}: ${url.searchParams.get("error_description")}`;
    if (url.origin !== origin) return ""; // at Google's, say
    const response = await send(url, { headers: { cookie: cookies.join("; ") } });
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

function keepTokens(said: string, given: schemas.OAuthTokens): Finding<schemas.OAuthTokens> {
  return { said, given, secrets: [given.access_token, given.refresh_token, given.id_token] };
}

export async function requestToken(
  { token_endpoint }: TenantMetadata,
  id: string | undefined,
  secret: string | undefined,
  audience: string,
): Promise<Finding<schemas.OAuthTokens>> {
  if (!id) throw new Error("AUTH0_CLIENT_ID is not set");
  if (!secret) throw new Error("AUTH0_CLIENT_SECRET is not set");
  // For this grant Auth0 wants its own `audience` in place of RFC 8707's `resource`.
  const request = { grant_type: "client_credentials", client_id: id, client_secret: secret, audience };
  const answer = await sendExpectingSuccess(token_endpoint, { method: "POST", body: new URLSearchParams(request) });
  return keepTokens(`issued to ${id}`, schemas.OAuthTokensSchema.parse(await answer.json()));
}

export async function signIn(
  { authorizationUrl }: Authorization,
  query: Promise<URLSearchParams>,
  openBrowser: (url: string) => void | Promise<void>,
  print: Print,
): Promise<Finding<{ code: string; iss: string | null }>> {
  print(`Open this in a browser, within ${SIGN_IN_MINUTES} minutes:\n\n${authorizationUrl}\n`);
  await openBrowser(authorizationUrl.href);
  const answer = await Promise.race([query, delay(SIGN_IN_MINUTES * 60_000, undefined, { ref: false })]);
  if (answer === undefined) throw new CannotTell(`nobody came back within ${SIGN_IN_MINUTES} minutes`);
  const code = answer.get("code");
  // The user may have declined, which is no missing setting.
  if (code === null) throw new CannotTell(`${answer.get("error")}: ${answer.get("error_description")}`);
  return { said: "done", given: { code, iss: answer.get("iss") }, secrets: [code] };
}

/** An answer without `iss` is refused where it is advertised, and one with another issuer always (RFC 9207 §2.4). */
export function compareAnswer(
  { code, iss }: { code: string; iss: string | null },
  tenant: TenantMetadata,
): Finding<string> {
  if (iss === null && !promisesIssuer(tenant)) return { said: "none, and none is advertised", given: code };
  return { said: compare(iss, tenant.issuer), given: code };
}

export async function exchangeCode(
  metadata: TenantMetadata,
  { clientInformation, callback: redirectUri }: TenantClient,
  request: { authorizationCode: string; codeVerifier: string; resource: string },
): Promise<Finding<schemas.OAuthTokens>> {
  const options = { ...request, metadata, clientInformation, redirectUri, fetchFn: sendExpectingSuccess };
  return keepTokens("issued", await oauth.exchangeAuthorization(metadata.issuer, options));
}

export function expectJwt({ access_token: text }: schemas.OAuthTokens): Finding<string> {
  const parts = text.split(".").length;
  if (parts === 5) throw new Error("found an encrypted one (JWE, 5 parts), expected a JWT of 3 parts");
  if (parts !== 3) throw new Error("found an opaque one, expected a JWT of 3 parts");
  const { alg, typ } = decodeProtectedHeader(text);
  return { said: `JWT, alg ${alg}, typ ${typ}`, given: text };
}

/** Strict clients get none, whatever they ask for. */
export const tellIdToken = ({ id_token }: schemas.OAuthTokens) =>
  id_token === undefined
    ? "none: the client is strict, untick OIDC enabled in Step 7"
    : "came: OIDC enabled in Step 7 can stay ticked";

/** ChatGPT compares what it asked for with what was granted. */
export function compareScopes(
  { scope, id_token }: schemas.OAuthTokens,
  asked: string[],
  { scopes_supported = [] }: TenantMetadata,
): string {
  const granted = scope?.split(" ").toSorted() ?? asked; // RFC 6749 §5.1
  const refused = scopes_supported.filter((name) => !granted.includes(name));
  const sides = `asked    ${asked.join(" ")}\ngranted  ${granted.join(" ")}`;
  if (id_token === undefined) return `not for strict clients\n${sides}`;
  if (refused.length > 0) throw new Error(`not granted: ${refused.join(" ")}\n${sides}`);
  return `all granted\n${sides}`;
}

export async function refresh(
  metadata: TenantMetadata,
  { clientInformation }: TenantClient,
  { refresh_token: refreshToken }: schemas.OAuthTokens,
  resource: string,
): Promise<Finding<schemas.OAuthTokens>> {
  if (refreshToken === undefined) throw new Error("found none, expected one");
  const options = { metadata, clientInformation, refreshToken, resource, fetchFn: sendExpectingSuccess };
  const renewed = await oauth.refreshAuthorization(metadata.issuer, options);
  return keepTokens(renewed.refresh_token === refreshToken ? "works" : "works, and is rotated", renewed);
}

/** As the server itself checks them. */
export async function verifyClaims(jwt: string, issuer: string, serverUrl: string): Promise<Finding<Caller>> {
  const authenticate = createAuthenticator({ issuer, url: serverUrl, name: "", scopes: [] });
  const caller = await authenticate(`Bearer ${jwt}`);
  const { exp, ...claims } = caller.claims;
  const lines = Object.entries({ ...claims, exp: new Date(Number(exp) * 1000).toISOString() })
    .flatMap(([name, value]) => value === undefined ? [] : [`${name.padEnd(13)}${value}`]);
  return { said: ["right", ...lines].join("\n"), given: caller };
}

/** Compares with the scopes of the server's metadata that are not the tenant's own. */
export function expectApiScopes(
  { scopes }: Caller,
  { scopes_supported = [] }: ResourceMetadata,
  tenant: TenantMetadata,
): string {
  const needed = scopes_supported.filter((name) => !tenant.scopes_supported?.includes(name));
  const lacking = needed.filter((name) => !scopes.has(name));
  if (lacking.length > 0) throw new Error(`found no ${lacking.join(" ")}, expected ${needed.join(" ")}`);
  return needed.join(" ") || "none needed without ENFORCE_SCOPES";
}

export async function initialize(serverUrl: string, jwt: string): Promise<Finding<Client>> {
  const client = new Client({ name: CLIENT_NAME, version: "1.0.0" });
  const transport = new StreamableHTTPClientTransport(new URL(serverUrl), {
    fetch: sendExpectingSuccess,
    requestInit: { headers: { authorization: `Bearer ${jwt}` } },
  });
  await client.connect(transport, { timeout: TIMEOUT_MS });
  return { said: `protocol ${transport.protocolVersion}`, given: client };
}

export async function listTools(client: Client): Promise<string> {
  const { tools } = await client.listTools({}, { timeout: TIMEOUT_MS });
  return tools.map(({ name }) => name).join(", ");
}

/** Closes the client, since no check follows. */
export async function getProfile(client: Client): Promise<string> {
  const call = { name: "get_profile", arguments: {} };
  const result = await client.callTool(call, undefined, { timeout: TIMEOUT_MS }).finally(() => client.close());
  if (result.isError || !result.structuredContent) throw new Error(JSON.stringify(result.content));
  return JSON.stringify(result.structuredContent);
}
