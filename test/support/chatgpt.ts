/**
 * A client that links an MCP server as ChatGPT does, as far as that is known from OpenAI's documentation
 * and from the field (README, "What was tried"). It is given the server's URL and nothing else.
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
import {
  discoverAuthorizationServerMetadata,
  discoverOAuthProtectedResourceMetadata,
  exchangeAuthorization,
  extractWWWAuthenticateParams,
  refreshAuthorization,
  registerClient,
  startAuthorization,
} from "@modelcontextprotocol/sdk/client/auth.js";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import type {
  AuthorizationServerMetadata,
  OAuthClientInformationMixed,
  OAuthClientMetadata,
  OAuthTokens,
} from "@modelcontextprotocol/sdk/shared/auth.js";
import type { CallToolResult, Tool } from "@modelcontextprotocol/sdk/types.js";
import { CallToolResultSchema } from "@modelcontextprotocol/sdk/types.js";
import { decodeJwt } from "jose";

/** Scopes that say who the user is. ChatGPT has no use for them where "OIDC enabled" is not ticked. */
const IDENTITY_SCOPES = new Set(
  ("openid profile name given_name family_name nickname email email_verified picture created_at identities " +
    "phone address").split(" "),
);

/** One callback a connector. */
const REDIRECT_URL = `https://chatgpt.com/connector/oauth/${randomUUID()}`;

const CLIENT_METADATA: OAuthClientMetadata = {
  client_name: "ChatGPT",
  redirect_uris: [REDIRECT_URL],
  grant_types: ["authorization_code", "refresh_token"],
  response_types: ["code"],
  token_endpoint_auth_method: "none",
};

/** Why a link failed. */
export class LinkError extends Error {
  /** ChatGPT's own code, where there is one. */
  readonly code: string | undefined;

  constructor(message: string, code?: string) {
    super(code ? `${code}: ${message}` : message);
    this.code = code;
  }
}

/** One step of the flow, for whoever wants to show it. Never holds a token. */
export interface Hop {
  number: number;
  title: string;
  asked: string;
  answered: string;
  failed: boolean;
}

/** The fields of ChatGPT's "New App" form, the browser, and somebody who looks on. */
export interface ConnectorOptions {
  mcpServerUrl: string;
  /** Shows the user a page, and returns the callback URL where that ends. */
  browser: (authorizeUrl: URL) => Promise<URL>;
  /** Advanced OAuth settings → OIDC enabled: ticked (true) unless the user unticks it. */
  oidcEnabled?: boolean;
  /** `https://chatgpt.com/oauth/{id}/client.json`. Used where the tenant takes such documents. */
  clientMetadataUrl?: string;
  observe?: (hop: Hop) => void;
}

/** What a link consists of: where it leads, as which client, and with which tokens. */
interface Link {
  /** `resource` of the server's metadata, sent as it stands on every authorize and token request (RFC 8707). */
  resource: string;
  resourceScopes: string[];
  authorizationServer: string;
  metadata: AuthorizationServerMetadata;
  clientInformation: OAuthClientInformationMixed;
  requestedScopes: string[];
  tokens: OAuthTokens;
}

export class Connector {
  /** Tools of the server, known from the first link on. */
  tools: Tool[] = [];
  /** What the profile tool said while linking: empty where the server has none. */
  profile: Record<string, unknown> = {};

  readonly #options: ConnectorOptions;
  readonly #client = new Client({ name: "ChatGPT", version: "1.0.0" });
  #link: Link | undefined;

  constructor(options: ConnectorOptions) {
    this.#options = options;
  }

  get tokens(): OAuthTokens {
    if (!this.#link) throw new Error("The connector is not linked");
    return this.#link.tokens;
  }

  /**
   * Signs the user in and reads the tools. Called again, it signs in anew, as ChatGPT does when a tool error
   * asks for it.
   *
   * @throws {LinkError} or the error of the hop that failed.
   */
  async link(): Promise<void> {
    const metadataUrl = await this.#provokeChallenge();
    const discovered = await this.#discover(metadataUrl);
    const clientInformation = await this.#identify(discovered.metadata);
    const requestedScopes = this.#scopesToRequest(discovered.metadata, discovered.resourceScopes);
    const request = { ...discovered, clientInformation, requestedScopes };
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
      return [result, JSON.stringify(result.structuredContent ?? result.content)];
    });
  }

  /** Exchanges the refresh token, as ChatGPT does before the access token expires. */
  async refresh(): Promise<void> {
    if (!this.#link) throw new Error("The connector is not linked");
    const { authorizationServer, requestedScopes, tokens: { refresh_token: refreshToken } } = this.#link;
    const request = { ...this.#link };
    const asked =
      `POST ${request.metadata.token_endpoint} grant_type=refresh_token resource=${request.resource}`;
    this.#link.tokens = await this.#hop(6, "Refresh", asked, async () => {
      if (!refreshToken) throw new LinkError("No refresh token: access ends when the access token expires");
      const tokens = await refreshAuthorization(authorizationServer, { ...request, refreshToken });
      return [tokens, describeTokens(requestedScopes, tokens)];
    });
  }

  async close(): Promise<void> {
    await this.#client.close();
  }

  /** @returns Where the 401's challenge says that the metadata is. */
  #provokeChallenge(): Promise<URL | undefined> {
    const { mcpServerUrl } = this.#options;
    return this.#hop(1, "Call without a token", `POST ${mcpServerUrl}`, async () => {
      const response = await fetch(mcpServerUrl, {
        method: "POST",
        headers: { "content-type": "application/json", accept: "application/json, text/event-stream" },
        body: JSON.stringify({ jsonrpc: "2.0", id: 1, method: "tools/list" }),
      });
      await response.body?.cancel();
      if (response.status !== 401) throw new LinkError(`Expected 401, got ${response.status}`);
      const challenge = response.headers.get("www-authenticate");
      return [extractWWWAuthenticateParams(response).resourceMetadataUrl, `401 ${challenge}`];
    });
  }

  async #discover(resourceMetadataUrl: URL | undefined) {
    const { mcpServerUrl } = this.#options;
    const asked = `GET ${resourceMetadataUrl ?? "the well-known address"}`;
    const resourceMetadata = await this.#hop(2, "Protected resource metadata", asked, async () => {
      const at = resourceMetadataUrl && { resourceMetadataUrl };
      const document = await discoverOAuthProtectedResourceMetadata(mcpServerUrl, at);
      // RFC 9728 §3.3: a document for another resource must not be used.
      if (document.resource !== mcpServerUrl) throw new LinkError(`It is about ${document.resource}`);
      return [document, summary(document, "resource", "authorization_servers", "scopes_supported")];
    });
    const { resource, authorization_servers: [authorizationServer = ""] = [] } = resourceMetadata;
    const wellKnown = `GET ${authorizationServer}.well-known/oauth-authorization-server`;
    const metadata = await this.#hop(3, "Authorization server metadata", wellKnown, async () => {
      const document = await discoverAuthorizationServerMetadata(authorizationServer);
      if (!document) throw new LinkError("The authorization server publishes no metadata");
      return [document, summary(document, "issuer", "scopes_supported", "registration_endpoint")];
    });
    return {
      resource,
      resourceScopes: resourceMetadata.scopes_supported ?? [],
      authorizationServer,
      metadata,
    };
  }

  /** By a metadata document where the authorization server takes them, by registration otherwise. */
  #identify(metadata: AuthorizationServerMetadata): Promise<OAuthClientInformationMixed> {
    const { clientMetadataUrl } = this.#options;
    if (metadata.client_id_metadata_document_supported && clientMetadataUrl) {
      return this.#hop(4, "Client ID metadata document", `client_id=${clientMetadataUrl}`, () => {
        return Promise.resolve([{ client_id: clientMetadataUrl }, "nothing to register"]);
      });
    }
    return this.#hop(4, "Registration", `POST ${metadata.registration_endpoint}`, async () => {
      const client = await registerClient(metadata.issuer, { metadata, clientMetadata: CLIENT_METADATA });
      return [client, `client_id ${client.client_id}`];
    });
  }

  /**
   * All that the authorization server advertises, and what the tools ask for once they are known. Without
   * OIDC, what the resource advertises stands in for the former.
   */
  #scopesToRequest(
    { scopes_supported = [] }: AuthorizationServerMetadata,
    resourceScopes: string[],
  ): string[] {
    const { oidcEnabled = true } = this.#options;
    const toolScopes = this.tools.flatMap(securityScopes);
    if (oidcEnabled) return unique([...scopes_supported, ...toolScopes]);
    return unique([...resourceScopes, ...toolScopes]).filter((scope) => !IDENTITY_SCOPES.has(scope));
  }

  async #authorize(request: Omit<Link, "tokens">): Promise<{ code: string; codeVerifier: string }> {
    const { authorizationServer, metadata, resource, requestedScopes } = request;
    const scope = requestedScopes.join(" ");
    const state = randomBytes(330).toString("base64url"); // ChatGPT's can be longer than 400 characters
    const { authorizationUrl, codeVerifier } = await startAuthorization(authorizationServer, {
      ...request,
      redirectUrl: REDIRECT_URL,
      scope,
      state,
    });
    const asked = `GET ${metadata.authorization_endpoint} resource=${resource} scope=${scope}`;
    const code = await this.#hop(5, "Sign-in and consent, in the browser", asked, async () => {
      const { code, error, error_description, ...callback } = Object.fromEntries(
        (await this.#options.browser(authorizationUrl)).searchParams,
      );
      if (callback.state !== state) throw new LinkError("The callback has another state");
      if (!code) throw new LinkError(`${error}: ${error_description}`);
      return [code, `302 to ${REDIRECT_URL} with a code`];
    });
    return { code, codeVerifier };
  }

  #exchange(
    request: Omit<Link, "tokens">,
    authorizationCode: string,
    codeVerifier: string,
  ): Promise<OAuthTokens> {
    const { authorizationServer, metadata, resource, requestedScopes } = request;
    const { oidcEnabled = true } = this.#options;
    const asked = `POST ${metadata.token_endpoint} grant_type=authorization_code resource=${resource}`;
    return this.#hop(6, "Token", asked, async () => {
      const redirectUri = REDIRECT_URL;
      const tokens = await exchangeAuthorization(authorizationServer, {
        ...request,
        authorizationCode,
        codeVerifier,
        redirectUri,
      });
      if (oidcEnabled && !tokens.id_token) {
        throw new LinkError(
          "We couldn't connect this account (no ID token)",
          "OAUTH_OWNER_PROFILE_ID_MISSING",
        );
      }
      checkScopes(requestedScopes, tokens);
      return [tokens, describeTokens(requestedScopes, tokens)];
    });
  }

  #listTools(): Promise<Tool[]> {
    return this.#hop(7, "Tools", "initialize, tools/list with the token", async () => {
      await this.#client.close();
      await this.#client.connect(this.#transport());
      const { tools } = await this.#client.listTools();
      return [tools, tools.map((tool) => tool.name).join(", ")];
    });
  }

  /** Asks who the user is, for the name that the account gets in ChatGPT. */
  async #readProfile(): Promise<Record<string, unknown>> {
    const name = this.tools.find((tool) => tool._meta?.["openai/profile"] === true)?.name;
    if (!name) return {};
    return await this.#hop(8, "Profile", `tools/call ${name}`, async () => {
      const { structuredContent } = await this.#call(name, {});
      if (typeof structuredContent?.id !== "string") throw new LinkError("The profile has no id");
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
        const response = await fetch(url, { ...init, headers });
        if (response.status !== 401 && response.status !== 503) return response;
        const reason = response.headers.get("www-authenticate") ?? await response.text();
        throw new LinkError(`${response.status} ${reason}`);
      },
    });
  }

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

/** A client metadata document on loopback, in place of the one that chatgpt.com serves. */
export async function publishClientMetadata(): Promise<{ url: string; close: () => Promise<void> }> {
  const server = createServer((_, response) => {
    response.setHeader("content-type", "application/json");
    response.end(JSON.stringify({ ...CLIENT_METADATA, client_id: url }));
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const url = `http://localhost:${(server.address() as AddressInfo).port}/oauth/${randomUUID()}/client.json`;
  return {
    url,
    close: async () => {
      server.close();
      server.closeAllConnections();
      await once(server, "close");
    },
  };
}

/** @throws {LinkError} where the granted scopes are not the requested ones. */
function checkScopes(requested: string[], { scope }: OAuthTokens): void {
  const granted = grantedScopes(requested, scope);
  const missing = requested.filter((name) => !granted.includes(name));
  const unexpected = granted.filter((name) => !requested.includes(name));
  if (missing.length === 0 && unexpected.length === 0) return;
  throw new LinkError(
    "Granted OAuth scopes do not match the requested scopes. Not all requested permissions were granted" +
      ` (missing: ${missing.join(" ") || "none"}; not asked for: ${unexpected.join(" ") || "none"})`,
    "OAUTH_SCOPES_MISMATCH",
  );
}

/** A token response that names no scope grants all (RFC 6749 §5.1). */
function grantedScopes(requested: string[], scope: string | undefined): string[] {
  return scope === undefined ? requested : scope.split(" ").filter(Boolean);
}

/** The scopes of a tool's `securitySchemes`, which SDK v1 can only carry in `_meta`. */
function securityScopes(tool: Tool): string[] {
  const schemes = tool._meta?.securitySchemes;
  return Array.isArray(schemes)
    ? schemes.flatMap((scheme: { scopes?: string[] }) => scheme.scopes ?? [])
    : [];
}

/** What kind of tokens came, never the tokens. */
function describeTokens(
  requested: string[],
  { access_token, refresh_token, id_token, scope }: OAuthTokens,
): string {
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

function unique(values: string[]): string[] {
  return [...new Set(values)];
}
