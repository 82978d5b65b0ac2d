/**
 * A client that links an MCP server as ChatGPT does, as far as OpenAI's documentation and users' reports tell
 * (README, "What was tried"). It is given the server's URL and nothing else.
 *
 * Hops are numbered as in the README's diagram: 1 a call without a token, 2 the resource's metadata, 3 the
 * authorization server's, 4 registration, 5 sign-in, 6 the token, 7 the tools, 8 the profile, 9 tool calls.
 *
 * This is NOT ChatGPT: its addresses, its client certificate and its user interface are left out, and the
 * browser is a function that the caller passes in.
 */
import { randomBytes, randomUUID } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import * as oauth from "@modelcontextprotocol/sdk/client/auth.js";
import { createPrivateKeyJwtAuth } from "@modelcontextprotocol/sdk/client/auth-extensions.js";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import type * as schemas from "@modelcontextprotocol/sdk/shared/auth.js";
import type { CallToolResult } from "@modelcontextprotocol/sdk/types.js";
import { CallToolResultSchema, ListToolsResultSchema, ToolSchema } from "@modelcontextprotocol/sdk/types.js";
import { decodeJwt, exportJWK, generateKeyPair, type JWK } from "jose";
import { z } from "zod";
import { OIDC_SCOPES } from "./tenant.ts";

/** Scopes that say who the user is. ChatGPT has no use for them where "OIDC enabled" is not ticked. */
const IDENTITY_SCOPES = new Set(OIDC_SCOPES.filter((scope) => scope !== "offline_access"));

/** A tool as OpenAI documents it. The SDK's own schema drops `securitySchemes`. */
const ToolSchemaOfOpenAi = ToolSchema.extend({
  securitySchemes: z.array(z.object({ scopes: z.array(z.string()).optional() })).optional(),
});
type Tool = z.infer<typeof ToolSchemaOfOpenAi>;
const ToolsResultSchema = ListToolsResultSchema.extend({ tools: z.array(ToolSchemaOfOpenAi) });

/** The callback URL of all connections, or with `callbackId` that of one. */
function redirectUrl(callbackId?: string): string {
  return callbackId === undefined
    ? "https://chatgpt.com/connector_platform_oauth_redirect"
    : `https://chatgpt.com/connector/oauth/${callbackId}`;
}

function clientMetadata(callbackId?: string) {
  return {
    client_name: "ChatGPT",
    redirect_uris: [redirectUrl(callbackId)],
    grant_types: ["authorization_code", "refresh_token"],
    response_types: ["code"],
    token_endpoint_auth_method: "none",
  } satisfies schemas.OAuthClientMetadata;
}

/** One request of the flow and its answer, to be shown. Never holds a token. */
export interface Hop {
  number: number;
  title: string;
  asked: string;
  answered: string;
  failed: boolean;
}

/** The fields of ChatGPT's form for a custom MCP server, the browser, and an observer. */
export interface ConnectorOptions {
  mcpServerUrl: string;
  /** Shows the user a page, and returns the callback URL where that ends. */
  browser: (authorizeUrl: URL) => Promise<URL>;
  /** Advanced OAuth settings → OIDC enabled: ticked (true) unless the user unticks it. */
  oidcEnabled?: boolean;
  /** Advanced OAuth settings → Client ID and Secret of an application made by hand. */
  fixedClient?: { client_id: string; client_secret: string };
  /** Used where the tenant takes client metadata documents. Left out, ChatGPT registers itself there, too. */
  clientDocuments?: ClientDocuments;
  /** The connection's id in its own callback and document URLs. The form shows it. */
  callbackId?: string;
  observe?: (hop: Hop) => void;
}

/** What a link consists of: where it leads, as which client, and with which tokens. */
interface Link {
  /** `resource` of the server's metadata, sent as it stands on every authorize and token request (RFC 8707). */
  resource: string;
  resourceScopes: string[];
  authorizationServer: string;
  metadata: schemas.AuthorizationServerMetadata;
  /** Undefined: the callback and the document of all connections. */
  callbackId: string | undefined;
  clientInformation: schemas.OAuthClientInformationMixed;
  addClientAuthentication?: oauth.AddClientAuthentication;
  requestedScopes: string[];
  tokens: schemas.OAuthTokens;
}

type LinkRequest = Omit<Link, "tokens">;
type ClientIdentity = Pick<Link, "clientInformation" | "addClientAuthentication">;

export class Connector {
  /** Tools of the server, known from the first link on. */
  tools: Tool[] = [];
  /** What the profile tool said while linking: empty where the server has none. */
  profile: Record<string, unknown> = {};

  readonly #options: ConnectorOptions;
  readonly #client = new Client({ name: "ChatGPT", version: "1.0.0" });
  readonly #callbackId: string;
  #link: Link | undefined;
  /** Scopes of tools' challenges, which the next link requests. */
  readonly #challengedScopes: string[] = [];

  constructor(options: ConnectorOptions) {
    this.#options = options;
    this.#callbackId = options.callbackId ?? randomUUID();
  }

  get tokens(): schemas.OAuthTokens {
    if (!this.#link) throw new Error("The connector is not linked");
    return this.#link.tokens;
  }

  /**
   * Signs the user in and reads the tools. Called again, it signs in anew, as ChatGPT does when a tool error
   * asks for it.
   *
   * @throws {Error} The error of the hop that failed.
   */
  async link(): Promise<void> {
    const discovered = await this.#discover(await this.#provokeChallenge());
    const client = await this.#identify(discovered);
    const requestedScopes = this.#scopesToRequest(discovered);
    const request = { ...discovered, ...client, requestedScopes };
    const { code, codeVerifier } = await this.#authorize(request);
    const tokens = await this.#exchange(request, code, codeVerifier);
    this.#link = { ...request, tokens };
    this.tools = await this.#listTools();
    this.profile = await this.#readProfile();
  }

  /** Calls a tool as the model does. A tool error is a result, not an exception. */
  callTool(name: string, input: Record<string, unknown> = {}): Promise<CallToolResult> {
    return this.#hop(9, "Tool call", `tools/call ${name} ${JSON.stringify(input)}`, async () => {
      const result = await this.#call(name, input);
      const challenges = z.array(z.string()).safeParse(result._meta?.["mcp/www_authenticate"]).data ?? [];
      this.#challengedScopes.push(...challenges.flatMap((one) => readChallenge(one).scope ?? []));
      return [result, JSON.stringify(result.structuredContent ?? result.content)];
    });
  }

  /** Exchanges the refresh token, as ChatGPT does before the access token expires. */
  async refresh(): Promise<void> {
    const link = this.#link;
    if (!link) throw new Error("The connector is not linked");
    const { authorizationServer, requestedScopes, tokens: { refresh_token: refreshToken }, ...request } = link;
    const asked = `POST ${request.metadata.token_endpoint} grant_type=refresh_token resource=${request.resource}`;
    link.tokens = await this.#hop(6, "Refresh", asked, async () => {
      if (!refreshToken) throw new Error("No refresh token: access ends when the access token expires");
      const tokens = await oauth.refreshAuthorization(authorizationServer, { ...request, refreshToken });
      return [tokens, describeTokens(requestedScopes, tokens)];
    });
  }

  async close(): Promise<void> {
    await this.#client.close();
  }

  #provokeChallenge(): Promise<Challenge> {
    const { mcpServerUrl } = this.#options;
    return this.#hop(1, "Call without a token", `POST ${mcpServerUrl}`, async () => {
      const response = await this.#fetch(mcpServerUrl, {
        method: "POST",
        headers: { "content-type": "application/json", accept: "application/json, text/event-stream" },
        body: JSON.stringify({ jsonrpc: "2.0", id: 1, method: "tools/list" }),
      });
      await response.body?.cancel();
      if (response.status !== 401) throw new Error(`Expected 401, got ${response.status}`);
      const challenge = response.headers.get("www-authenticate") ?? "";
      return [readChallenge(challenge), `401 ${challenge}`];
    });
  }

  async #discover({ resourceMetadataUrl }: Challenge) {
    const { mcpServerUrl } = this.#options;
    const asked = `GET ${resourceMetadataUrl ?? "the well-known address"}`;
    const resourceMetadata = await this.#hop(2, "Protected resource metadata", asked, async () => {
      const at = resourceMetadataUrl && { resourceMetadataUrl };
      const document = await oauth.discoverOAuthProtectedResourceMetadata(mcpServerUrl, at, this.#fetch);
      // RFC 9728 §3.3: a document for another resource must not be used.
      if (document.resource !== mcpServerUrl) throw new Error(`It is about ${document.resource}`);
      return [document, summary(document, "resource", "authorization_servers", "scopes_supported")];
    });
    const { resource, authorization_servers: [authorizationServer = ""] = [] } = resourceMetadata;
    const wellKnown = `GET ${authorizationServer}.well-known/oauth-authorization-server`;
    const metadata = await this.#hop(3, "Authorization server metadata", wellKnown, async () => {
      const document = await oauth.discoverAuthorizationServerMetadata(authorizationServer);
      if (!document) throw new Error("The authorization server publishes no metadata");
      return [document, summary(document, "issuer", "scopes_supported", "registration_endpoint")];
    });
    return {
      resource,
      resourceScopes: resourceMetadata.scopes_supported ?? [],
      authorizationServer,
      metadata,
      // One redirect for all is safe only where each answer names its issuer (RFC 9207).
      callbackId: promisesIssuer(metadata) && metadata.issuer === authorizationServer ? undefined : this.#callbackId,
    };
  }

  /** With the fixed client, or else by a metadata document where the tenant takes them, or else by registration. */
  #identify({ metadata, callbackId }: Pick<Link, "metadata" | "callbackId">): Promise<ClientIdentity> {
    const { clientDocuments, fixedClient } = this.#options;
    if (fixedClient) {
      const asked = `client_id=${fixedClient.client_id}`;
      const identity = { clientInformation: fixedClient };
      return this.#hop(4, "Fixed client", asked, async () => [identity, "nothing to register"]);
    }
    if (metadata.client_id_metadata_document_supported && clientDocuments) {
      const url = clientDocuments.url(callbackId);
      return this.#hop(4, "Client ID metadata document", `client_id=${url}`, async () => {
        const { privateKey } = clientDocuments;
        const key = { issuer: url, subject: url, privateKey, alg: "RS256" };
        const addClientAuthentication = createPrivateKeyJwtAuth(key);
        return [{ clientInformation: { client_id: url }, addClientAuthentication }, "nothing to register"];
      });
    }
    return this.#hop(4, "Registration", `POST ${metadata.registration_endpoint}`, async () => {
      const request = { metadata, clientMetadata: clientMetadata(callbackId) };
      const clientInformation = await oauth.registerClient(metadata.issuer, request);
      return [{ clientInformation }, `client_id ${clientInformation.client_id}`];
    });
  }

  /**
   * All that the authorization server advertises, or without OIDC what the resource's metadata names; and what the
   * tools ask for once they are known. (Whether ChatGPT also reads the resource's scopes with OIDC is not known; here
   * it does not, so that nothing is granted only because of them.)
   */
  #scopesToRequest({ metadata, resourceScopes }: Pick<Link, "metadata" | "resourceScopes">): string[] {
    const { oidcEnabled = true } = this.#options;
    const toolScopes = [...this.tools.flatMap(securityScopes), ...this.#challengedScopes];
    if (oidcEnabled) return [...new Set([...metadata.scopes_supported ?? [], ...toolScopes])];
    return [...new Set([...resourceScopes, ...toolScopes])].filter((scope) => !IDENTITY_SCOPES.has(scope));
  }

  async #authorize(request: LinkRequest): Promise<{ code: string; codeVerifier: string }> {
    const { authorizationServer, metadata, resource, requestedScopes, callbackId } = request;
    const scope = requestedScopes.join(" ");
    const state = randomBytes(330).toString("base64url"); // ChatGPT's can be longer than 400 characters
    const authorization = { ...request, redirectUrl: redirectUrl(callbackId), scope, state };
    const { authorizationUrl, codeVerifier } = await oauth.startAuthorization(authorizationServer, authorization);
    const asked = `GET ${metadata.authorization_endpoint} resource=${resource} scope=${scope}`;
    const code = await this.#hop(5, "Sign-in and consent, in the browser", asked, async () => {
      const callback = await this.#options.browser(authorizationUrl);
      const { code, error, error_description, ...answer } = Object.fromEntries(callback.searchParams);
      if (answer.state !== state) throw new Error("The callback has another state");
      // RFC 9207 §2.4: an answer of another issuer, or without the promised issuer, is refused.
      if ((promisesIssuer(metadata) || answer.iss !== undefined) && answer.iss !== metadata.issuer) {
        const found = answer.iss ?? "(none)";
        throw new Error(`The authorization response has the iss ${found}, expected ${metadata.issuer}`);
      }
      if (!code) throw new Error(`${error}: ${error_description}`);
      return [code, `302 to ${redirectUrl(callbackId)} with a code${answer.iss ? " and iss" : ""}`];
    });
    return { code, codeVerifier };
  }

  #exchange(request: LinkRequest, authorizationCode: string, codeVerifier: string): Promise<schemas.OAuthTokens> {
    const { authorizationServer, metadata, resource, requestedScopes, callbackId } = request;
    const { oidcEnabled = true } = this.#options;
    const asked = `POST ${metadata.token_endpoint} grant_type=authorization_code resource=${resource}`;
    return this.#hop(6, "Token", asked, async () => {
      const exchanged = { ...request, authorizationCode, codeVerifier, redirectUri: redirectUrl(callbackId) };
      const tokens = await oauth.exchangeAuthorization(authorizationServer, exchanged);
      if (oidcEnabled && !tokens.id_token) {
        throw new Error("OAUTH_OWNER_PROFILE_ID_MISSING: We couldn't connect this account (no ID token)");
      }
      checkScopes(requestedScopes, tokens);
      return [tokens, describeTokens(requestedScopes, tokens)];
    });
  }

  #listTools(): Promise<Tool[]> {
    return this.#hop(7, "Tools", "initialize, tools/list with the token", async () => {
      await this.#client.close();
      await this.#client.connect(this.#transport());
      await this.#client.listTools(); // from then on the SDK checks results against their schemas
      const { tools } = await this.#client.request({ method: "tools/list" }, ToolsResultSchema);
      return [tools, tools.map((tool) => tool.name).join(", ")];
    });
  }

  /** Reads who the user is, which names the account in ChatGPT. */
  async #readProfile(): Promise<Record<string, unknown>> {
    const name = this.tools.find((tool) => tool._meta?.["openai/profile"] === true)?.name;
    if (!name) return {};
    return await this.#hop(8, "Profile", `tools/call ${name}`, async () => {
      const { structuredContent } = await this.#call(name, {});
      if (typeof structuredContent?.id !== "string") throw new Error("The profile has no id");
      return [structuredContent, JSON.stringify(structuredContent)];
    });
  }

  async #call(name: string, input: Record<string, unknown>): Promise<CallToolResult> {
    return CallToolResultSchema.parse(await this.#client.callTool({ name, arguments: input }));
  }

  #transport(): StreamableHTTPClientTransport {
    return new StreamableHTTPClientTransport(new URL(this.#options.mcpServerUrl), {
      fetch: async (url, init) => {
        const headers = new Headers(init?.headers);
        headers.set("authorization", `Bearer ${this.tokens.access_token}`);
        const response = await this.#fetch(url, { ...init, headers });
        if (response.status !== 401 && response.status !== 503) return response;
        const reason = response.headers.get("www-authenticate") ?? await response.text();
        throw new Error(`${response.status} ${reason}`);
      },
    });
  }

  /** To the MCP server. */
  readonly #fetch = (url: string | URL, init?: RequestInit): Promise<Response> => {
    const headers = new Headers(init?.headers);
    headers.set("user-agent", "openai-mcp/1.0.0"); // as ChatGPT's own requests announce themselves
    return fetch(url, { ...init, headers });
  };

  async #hop<Result>(
    number: number,
    title: string,
    asked: string,
    run: () => Promise<[result: Result, answered: string]>,
  ): Promise<Result> {
    const { observe } = this.#options;
    try {
      const [result, answered] = await run();
      observe?.({ number, title, asked, answered, failed: false });
      return result;
    } catch (error) {
      const answered = error instanceof Error ? error.message : String(error);
      observe?.({ number, title, asked, answered, failed: true });
      throw error;
    }
  }
}

/** Client metadata documents, in place of those that chatgpt.com serves. */
export interface ClientDocuments {
  /** `https://chatgpt.com/oauth/client.json`, or with `callbackId` that of one connection. */
  url(callbackId?: string): string;
  /** Signs the assertions by which ChatGPT authenticates as the document's client. */
  privateKey: JWK;
  close(): Promise<void>;
}

/** Serves them on loopback. */
export async function publishClientMetadata(): Promise<ClientDocuments> {
  const { privateKey, publicKey } = await generateKeyPair("RS256", { extractable: true });
  const publicJwk = { ...await exportJWK(publicKey), kid: "cimd", use: "sig", alg: "RS256" };
  const server = createServer(({ url: path = "" }, response) => {
    const [, callbackId] = /^\/oauth\/(.+)\/client\.json$/.exec(path) ?? [];
    const document = path === "/oauth/jwks.json" ? { keys: [publicJwk] } : {
      ...clientMetadata(callbackId),
      client_id: `${origin}${path}`,
      token_endpoint_auth_method: "private_key_jwt",
      token_endpoint_auth_methods_supported: ["none", "private_key_jwt"],
      token_endpoint_auth_signing_alg: "RS256",
      jwks_uri: `${origin}/oauth/jwks.json`,
    };
    response.setHeader("content-type", "application/json").end(JSON.stringify(document));
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const origin = `http://localhost:${(server.address() as AddressInfo).port}`;
  return {
    url: (callbackId) => `${origin}/oauth/${callbackId === undefined ? "" : `${callbackId}/`}client.json`,
    privateKey: await exportJWK(privateKey),
    close: async () => {
      server.close();
      server.closeAllConnections();
      await once(server, "close");
    },
  };
}

/** What a challenge says, in a 401's header or in a tool error. */
interface Challenge {
  resourceMetadataUrl: URL | undefined;
  scope: string[] | undefined;
}

function readChallenge(challenge: string): Challenge {
  const response = new Response(null, { headers: { "www-authenticate": challenge } });
  const { resourceMetadataUrl, scope } = oauth.extractWWWAuthenticateParams(response);
  return { resourceMetadataUrl, scope: scope?.split(" ") };
}

/** Whether the tenant includes the issuer in authorization responses (RFC 9207). */
function promisesIssuer(metadata: schemas.AuthorizationServerMetadata): boolean {
  return "authorization_response_iss_parameter_supported" in metadata &&
    metadata.authorization_response_iss_parameter_supported === true;
}

/** @throws {Error} where the granted scopes are not the requested ones. */
function checkScopes(requested: string[], { scope }: schemas.OAuthTokens): void {
  const granted = grantedScopes(requested, scope);
  const missing = requested.filter((name) => !granted.includes(name));
  const unexpected = granted.filter((name) => !requested.includes(name));
  if (missing.length === 0 && unexpected.length === 0) return;
  throw new Error(
    "OAUTH_SCOPES_MISMATCH: Granted OAuth scopes do not match the requested scopes. Not all requested permissions were " +
      `granted (missing: ${missing.join(" ") || "none"}; not asked for: ${unexpected.join(" ") || "none"})`,
  );
}

/** A token response that names no scope grants all (RFC 6749 §5.1). */
function grantedScopes(requested: string[], scope: string | undefined): string[] {
  return scope === undefined ? requested : scope.split(" ").filter(Boolean);
}

/** `securitySchemes` as OpenAI documents it, or its mirror, which is all that SDK v1's `registerTool` lets through. */
function securityScopes({ securitySchemes, _meta }: Tool): string[] {
  const schemes = securitySchemes ?? ToolSchemaOfOpenAi.shape.securitySchemes.parse(_meta?.securitySchemes);
  return schemes?.flatMap(({ scopes = [] }) => scopes) ?? [];
}

/** The kinds of the tokens, never the tokens themselves. */
function describeTokens(requested: string[], tokens: schemas.OAuthTokens): string {
  const { access_token, refresh_token, id_token, scope } = tokens;
  return [
    `access token: ${describeAccessToken(access_token)}`,
    `refresh token: ${refresh_token ? "yes" : "no"}`,
    `ID token: ${id_token ? "yes" : "no"}`,
    `scopes: ${grantedScopes(requested, scope).length} of ${requested.length} asked for`,
  ].join("; ");
}

function describeAccessToken(token: string): string {
  const parts = token.split(".").length;
  if (parts === 5) return "encrypted (JWE, 5 parts)";
  if (parts !== 3) return "opaque";
  const { sub, aud } = decodeJwt(token);
  return `JWT for ${[aud].flat().join(" and ")}, sub ${sub}`;
}

function summary(document: Record<string, unknown>, ...names: string[]): string {
  const written = (value: unknown) => Array.isArray(value) ? value.join(" ") : String(value);
  return names.map((name) => `${name}: ${written(document[name])}`).join("; ");
}
