/**
 * A stand-in for an Auth0 tenant, so that the demo and the tests need neither an account nor a network.
 *
 * NOT FOR PRODUCTION: it asks for no password, keeps everything in memory and listens on loopback only.
 *
 * What a request passes, in the order of the file: discovery and keys, registration, authorize with the
 * sign-in and consent page, the token endpoint, and the scopes and tokens that come out of it. Settings
 * bear the names of Auth0's dashboard and can be changed at any time. Behaviour follows Auth0's
 * documentation and what others have seen in the field (README, "What was tried"); the words of error
 * messages that nobody has quoted are this file's own.
 *
 * Left out: /userinfo, /oauth/revoke, sessions, rate limits, custom domains, organizations, Rules, the
 * Management API and every grant but the three of the token endpoint.
 */
import { createHash, randomBytes, randomUUID } from "node:crypto";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { text } from "node:stream/consumers";
import { compileFunction } from "node:vm";
import { OAuthClientMetadataSchema } from "@modelcontextprotocol/sdk/shared/auth.js";
import {
  type CryptoKey,
  EncryptJWT,
  exportJWK,
  generateKeyPair,
  type JWK,
  type JWTHeaderParameters,
  type JWTPayload,
  SignJWT,
} from "jose";

/** `scopes_supported` of every Auth0 tenant. An API's permissions are never among them. */
export const OIDC_SCOPES = (
  "openid profile offline_access name given_name family_name nickname " +
  "email email_verified picture created_at identities phone address"
).split(" ");

/** The scopes of OpenID Connect Core §5.4, which Auth0 grants for an API of one's own without an Action. */
const STANDARD_SCOPES = ["openid", "profile", "email", "address", "phone"];

/** Parameters of /authorize that Auth0 documents: to a strict client any other is an error. */
const AUTHORIZE_PARAMETERS = (
  "response_type client_id redirect_uri scope state code_challenge code_challenge_method audience resource " +
  "nonce prompt max_age login_hint ui_locales acr_values display authorization_details correlation_id dpop_jkt " +
  "response_mode connection organization"
).split(" ");

const TOKEN_LIFETIME_SECONDS = 86_400;

/** Two kinds since April 2026: Settings → Advanced → DCR Security Mode. */
export type TenantKind = "permissive" | "strict";

/** Applications → APIs. */
export interface Api {
  identifier: string;
  allowOfflineAccess: boolean;
  accessTokenProfile: "auth0" | "rfc9068";
  permissions: string[];
  /** Enable RBAC, together with Add Permissions in the Access Token. */
  enableRbac: boolean;
  /** User-Delegated Access of third-party applications: left out is Unauthorized. */
  defaultPermissionsForThirdPartyApplications?: string[];
}

/** User Management → Users. */
export interface User {
  sub: string;
  email: string;
  name: string;
  permissions: string[];
}

/** Applications → Applications, where clients that register themselves appear too. */
export interface Application {
  clientId: string;
  /** The document's URL, by which a client imported from it goes. */
  externalClientId?: string;
  clientSecret?: string;
  name: string;
  party: "first-party" | TenantKind;
  callbackUrls: string[];
  grantTypes: string[];
  /** Identifiers of the APIs that a machine-to-machine application is authorized for. */
  authorizedApis?: string[];
}

export interface TenantSettings {
  kind: TenantKind;
  dynamicClientRegistration: boolean;
  clientIdMetadataDocumentRegistration: boolean;
  defaultAudience: string;
  resourceParameterCompatibilityProfile: boolean;
  /** Settings → Advanced: `iss` with every answer of /authorize (RFC 9207). */
  includeIssuerInAuthorizationResponses: boolean;
  apis: Api[];
  /** Authentication → Database, Social, Enterprise. */
  connections: { name: string; domainLevel: boolean }[];
  applications: Application[];
  applicationLimit: number;
  /** Whether `auth0-action.js` is in the post-login flow. */
  postLoginAction: boolean;
  users: User[];
  /** What a token without an API looks like: Auth0 issues either. */
  userinfoToken: "encrypted" | "opaque";
}

export const ALICE: User = { sub: "auth0|alice", email: "alice@example.com", name: "Alice", permissions: [] };
export const BOB: User = { sub: "auth0|bob", email: "bob@example.com", name: "Bob", permissions: [] };

/** A tenant as Auth0 hands it over, with two users in it. */
export function newTenant(kind: TenantKind): TenantSettings {
  return {
    kind,
    dynamicClientRegistration: false,
    clientIdMetadataDocumentRegistration: false,
    defaultAudience: "",
    resourceParameterCompatibilityProfile: false,
    includeIssuerInAuthorizationResponses: false,
    apis: [],
    connections: [{ name: "Username-Password-Authentication", domainLevel: false }],
    applications: [],
    applicationLimit: 10,
    postLoginAction: false,
    users: [{ ...ALICE }, { ...BOB }],
    userinfoToken: "encrypted",
  };
}

/** The tenant after every step of the README's guide. */
export function configuredTenant(kind: TenantKind, mcpServerUrl: string): TenantSettings {
  const permissions = ["tasks:read", "tasks:write"];
  return {
    ...newTenant(kind),
    // Step 1: the API; its Default Permissions count on a strict tenant only.
    apis: [{
      identifier: mcpServerUrl,
      allowOfflineAccess: true,
      accessTokenProfile: "auth0",
      permissions,
      enableRbac: false,
      defaultPermissionsForThirdPartyApplications: permissions,
    }],
    // Step 2: tenant settings.
    defaultAudience: mcpServerUrl,
    dynamicClientRegistration: true,
    // Step 3: the connection.
    connections: [{ name: "Username-Password-Authentication", domainLevel: true }],
    // Step 4: the Action.
    postLoginAction: true,
    // Step 6: the machine-to-machine application.
    applications: [{
      clientId: "machine",
      clientSecret: "machine-secret",
      name: "MCP Server Test Client",
      party: "first-party",
      callbackUrls: [],
      grantTypes: ["client_credentials"],
      authorizedApis: [mcpServerUrl],
    }],
  };
}

/** A post-login Action, with the parts of `event` and `api` that this project's looks at. */
export type PostLoginAction = (
  event: { transaction?: { protocol?: string; requested_scopes?: string[] } },
  api: { accessToken: { addScope(scope: string): void } },
) => Promise<void>;

/** Loads `auth0-action.js` as Auth0 does: the pasted text, run as a CommonJS module. */
export function loadAction(): PostLoginAction {
  const exports: { onExecutePostLogin?: PostLoginAction } = {};
  const source = readFileSync(new URL("../../auth0-action.js", import.meta.url), "utf8");
  compileFunction(source, ["exports"])(exports);
  if (!exports.onExecutePostLogin) throw new Error("auth0-action.js exports no onExecutePostLogin");
  return exports.onExecutePostLogin;
}

interface SigningKey {
  kid: string;
  privateKey: CryptoKey;
  publicJwk: JWK;
}

async function newSigningKey(): Promise<SigningKey> {
  const { privateKey, publicKey } = await generateKeyPair("RS256");
  const kid = randomId();
  return { kid, privateKey, publicJwk: { ...await exportJWK(publicKey), kid, use: "sig", alg: "RS256" } };
}

/** An error as OAuth words it, with the HTTP status of the reply. */
class OAuthError extends Error {
  readonly code: string;
  readonly status: number;

  constructor(code: string, description: string, status = 400) {
    super(description);
    this.code = code;
    this.status = status;
  }
}

/** What a checked /authorize request asks for. */
interface AuthorizationRequest {
  application: Application;
  redirectUri: string;
  api: Api | undefined;
  requestedScopes: string[];
  codeChallenge?: string;
  codeChallengeMethod: string;
}

type TokenReply = Record<string, unknown>;

/** What a user has agreed to. Every refresh token that descends from it dies with `revoked`. */
interface Grant extends AuthorizationRequest {
  user: User;
  revoked: boolean;
}

export class Tenant {
  readonly settings: TenantSettings;
  /** Monitoring → Logs, oldest first. Every failure has the type `f` here. */
  readonly logs: { type: string; description: string }[] = [];
  /** How often the key set was asked for. */
  jwksRequests = 0;
  /** Answers the requests for the key set instead of the tenant, to make them fail. */
  answerJwks: ((response: ServerResponse) => void) | undefined;

  readonly #server: Server;
  readonly #action = loadAction();
  /** The current one first. */
  #signingKeys: [SigningKey, ...SigningKey[]];
  readonly #codes = new Map<string, Grant>();
  /** A refresh token that has been used stays, so that its reuse is noticed. */
  readonly #refreshTokens = new Map<string, { grant: Grant; used: boolean }>();

  constructor(settings: TenantSettings, signingKey: SigningKey) {
    this.settings = settings;
    this.#signingKeys = [signingKey];
    this.#server = createServer((request, response) => this.#answer(request, response));
  }

  /** What AUTH0_DOMAIN is set to. */
  get origin(): string {
    const { port } = this.#server.address() as AddressInfo;
    return `http://localhost:${port}`;
  }

  get issuer(): string {
    return `${this.origin}/`;
  }

  async listen(port: number): Promise<void> {
    this.#server.listen(port, "127.0.0.1");
    await once(this.#server, "listening");
  }

  async close(): Promise<void> {
    this.#server.close();
    this.#server.closeAllConnections();
    if (this.#server.listening) await once(this.#server, "close");
  }

  /** Settings → Signing Keys → Rotate, and with `withdraw` Revoke of the keys before. */
  async rotateKeys({ withdraw = false } = {}): Promise<void> {
    this.#signingKeys = [await newSigningKey(), ...(withdraw ? [] : this.#signingKeys)];
  }

  /**
   * Signs any access token, good by default: claims given replace the good ones, and one that is
   * `undefined` is left out.
   */
  sign(
    claims: Record<string, unknown> = {},
    { header, key }: { header?: Partial<JWTHeaderParameters>; key?: Parameters<SignJWT["sign"]>[0] } = {},
  ): Promise<string> {
    const [{ kid, privateKey }] = this.#signingKeys;
    const issuedAt = Math.floor(Date.now() / 1000);
    const payload: Record<string, unknown> = {
      iss: this.issuer,
      sub: ALICE.sub,
      aud: this.settings.apis[0]?.identifier,
      iat: issuedAt,
      exp: issuedAt + TOKEN_LIFETIME_SECONDS,
      scope: "openid profile email offline_access",
      azp: "chatgpt",
      ...claims,
    };
    return new SignJWT(payload).setProtectedHeader({ alg: "RS256", typ: "JWT", kid, ...header })
      .sign(key ?? privateKey);
  }

  /** Applications → Create Application → Import from URL. Auth0 takes https only; here loopback is fine. */
  async importFromUrl(url: string): Promise<void> {
    const document: unknown = await (await fetch(url)).json();
    const { client_name, redirect_uris } = OAuthClientMetadataSchema.parse(document);
    this.settings.applications.push({
      clientId: `tpc_${randomId()}`,
      externalClientId: url,
      name: client_name ?? url,
      party: "strict", // whatever the tenant's kind
      callbackUrls: redirect_uris,
      grantTypes: ["authorization_code", "refresh_token"],
    });
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const { pathname, searchParams } = new URL(request.url ?? "/", this.origin);
    if (pathname === "/.well-known/jwks.json") {
      this.jwksRequests++;
      if (this.answerJwks) return this.answerJwks(response);
    }
    const reply = await this.#route(`${request.method} ${pathname}`, searchParams, request).catch((error) => {
      const { code, message, status } = error instanceof OAuthError
        ? error
        : new OAuthError("server_error", String(error), 500);
      this.#log("f", message);
      // Errors of third-party clients stay on a page of Auth0's and in its logs: the client never learns.
      if (pathname === "/authorize") return errorPage(`${code}: ${message}`, status);
      return Response.json({ error: code, error_description: message }, { status });
    });
    response.writeHead(reply.status, Object.fromEntries(reply.headers)).end(await reply.text());
  }

  async #route(route: string, query: URLSearchParams, request: IncomingMessage): Promise<Response> {
    switch (route) {
      case "GET /.well-known/openid-configuration":
      case "GET /.well-known/oauth-authorization-server":
        return Response.json(this.#metadata());
      case "GET /.well-known/jwks.json":
        return Response.json({ keys: this.#signingKeys.map((key) => key.publicJwk) });
      case "POST /oidc/register":
        return this.#register(await text(request));
      case "GET /authorize":
        return this.#authorize(query);
      case "POST /authorize":
        return this.#authorize(query, new URLSearchParams(await text(request)));
      case "POST /oauth/token":
        return this.#token(await readParameters(request));
      default:
        throw new OAuthError("not_found", "Not found.", 404);
    }
  }

  /** The same document at both addresses. It lists registration whether or not that is switched on. */
  #metadata(): Record<string, unknown> {
    return {
      issuer: this.issuer,
      authorization_endpoint: `${this.origin}/authorize`,
      token_endpoint: `${this.origin}/oauth/token`,
      jwks_uri: `${this.origin}/.well-known/jwks.json`,
      registration_endpoint: `${this.origin}/oidc/register`,
      revocation_endpoint: `${this.origin}/oauth/revoke`,
      userinfo_endpoint: `${this.origin}/userinfo`,
      scopes_supported: OIDC_SCOPES,
      response_types_supported: ["code"],
      response_modes_supported: ["query"],
      subject_types_supported: ["public"],
      id_token_signing_alg_values_supported: ["RS256"],
      token_endpoint_auth_methods_supported: ["client_secret_basic", "client_secret_post", "private_key_jwt"],
      code_challenge_methods_supported: ["S256", "plain"],
      ...(this.settings.clientIdMetadataDocumentRegistration &&
        { client_id_metadata_document_supported: true }),
      ...(this.settings.includeIssuerInAuthorizationResponses &&
        { authorization_response_iss_parameter_supported: true }),
    };
  }

  /** Dynamic Client Registration (RFC 7591), open to anybody once it is switched on. */
  #register(body: string): Response {
    const { kind, dynamicClientRegistration, applications, applicationLimit } = this.settings;
    if (!dynamicClientRegistration) {
      throw new OAuthError("invalid_request", "Dynamic client registration is disabled");
    }
    if (applications.length >= applicationLimit) {
      const description = "You reached the limit of entities of this type for this tenant";
      throw new OAuthError("too_many_entities", description, 403);
    }
    const metadata = OAuthClientMetadataSchema.parse(JSON.parse(body));
    const isPublic = metadata.token_endpoint_auth_method === "none";
    const application: Application = {
      clientId: (kind === "strict" ? "tpc_" : "") + randomId(),
      ...(!isPublic && { clientSecret: randomId() }),
      name: metadata.client_name ?? "",
      party: kind,
      callbackUrls: metadata.redirect_uris,
      grantTypes: ["authorization_code", "refresh_token"],
    };
    applications.push(application);
    this.#log("sapi", "Dynamic client registration");
    return Response.json({
      ...metadata,
      client_id: application.clientId,
      ...(application.clientSecret &&
        { client_secret: application.clientSecret, client_secret_expires_at: 0 }),
      grant_types: application.grantTypes,
    }, { status: 201 });
  }

  /** The sign-in and consent page, and with `form` what was filled in there. */
  #authorize(query: URLSearchParams, form?: URLSearchParams): Response {
    const request = this.#checkAuthorizationRequest(query);
    const { application, redirectUri, requestedScopes } = request;
    if (!form) return signInPage(application, requestedScopes);

    const callback = new URL(redirectUri);
    const state = query.get("state");
    if (state !== null) callback.searchParams.set("state", state);
    if (form.get("decision") !== "accept") {
      callback.searchParams.set("error", "access_denied");
      callback.searchParams.set("error_description", "User did not authorize the request");
    } else {
      const user = this.settings.users.find(({ email }) => email === form.get("email"));
      if (!user) return signInPage(application, requestedScopes, "Wrong email");
      const code = randomId();
      this.#codes.set(code, { ...request, user, revoked: false });
      this.#log("s", `${user.email} signed in`);
      callback.searchParams.set("code", code);
    }
    return new Response(null, { status: 302, headers: { location: callback.href } });
  }

  #checkAuthorizationRequest(query: URLSearchParams): AuthorizationRequest {
    const clientId = query.get("client_id") ?? "";
    const application = this.#findApplication(clientId);
    if (!application) throw new OAuthError("invalid_request", `Unknown client: ${clientId}`);
    const redirectUri = query.get("redirect_uri") ?? "";
    if (
      !application.callbackUrls.some((url) => withoutLoopbackPort(url) === withoutLoopbackPort(redirectUri))
    ) {
      throw new OAuthError("invalid_request", `Callback URL mismatch: ${redirectUri}`);
    }
    if (query.get("response_type") !== "code") {
      throw new OAuthError("unsupported_response_type", "response_type must be code");
    }
    const codeChallenge = query.get("code_challenge");
    if (application.party === "strict") {
      const unknown = [...query.keys()].find((name) => !AUTHORIZE_PARAMETERS.includes(name));
      if (unknown) throw new OAuthError("invalid_request", `Unknown parameter: ${unknown}`);
      if (!codeChallenge) throw new OAuthError("invalid_request", "code_challenge is required");
    }
    const api = this.#findApi(query.get("audience"), query.get("resource"));
    if (application.party === "strict" && api && !api.defaultPermissionsForThirdPartyApplications) {
      throw new OAuthError(
        "access_denied",
        `Client "${application.clientId}" is not authorized to access resource server "${api.identifier}"`,
      );
    }
    const { connections } = this.settings;
    if (!connections.some(({ domainLevel }) => application.party === "first-party" || domainLevel)) {
      throw new OAuthError("invalid_request", "no connections enabled for the client");
    }
    return {
      application,
      redirectUri,
      api,
      requestedScopes: query.get("scope")?.split(" ").filter(Boolean) ?? [],
      ...(codeChallenge && { codeChallenge }),
      codeChallengeMethod: query.get("code_challenge_method") ?? "plain",
    };
  }

  #findApplication(id: string): Application | undefined {
    return this.settings.applications.find((one) => one.clientId === id || one.externalClientId === id);
  }

  /** The API that a token is for: none is Auth0's own /userinfo. `audience` wins over `resource`. */
  #findApi(audience: string | null, resource: string | null): Api | undefined {
    const { apis, defaultAudience, resourceParameterCompatibilityProfile } = this.settings;
    const identifier = audience || (resourceParameterCompatibilityProfile && resource) || defaultAudience;
    if (!identifier) return undefined;
    const api = apis.find((candidate) => candidate.identifier === identifier);
    if (!api) throw new OAuthError("access_denied", `Service not found: ${identifier}`);
    return api;
  }

  async #token(parameters: URLSearchParams): Promise<Response> {
    const application = this.#findApplication(parameters.get("client_id") ?? "");
    if (!application || application.clientSecret !== (parameters.get("client_secret") ?? undefined)) {
      throw new OAuthError("invalid_client", "Unauthorized", 401);
    }
    const grantType = parameters.get("grant_type") ?? "";
    if (!application.grantTypes.includes(grantType)) {
      throw new OAuthError(
        "unauthorized_client",
        `Grant type '${grantType}' not allowed for the client.`,
        403,
      );
    }
    const tokens = grantType === "authorization_code"
      ? await this.#exchangeCode(application, parameters)
      : grantType === "refresh_token"
      ? await this.#refresh(application, parameters)
      : await this.#authorizeMachine(application, parameters);
    return Response.json(
      { ...tokens, token_type: "Bearer", expires_in: TOKEN_LIFETIME_SECONDS },
      { headers: { "cache-control": "no-store" } },
    );
  }

  #exchangeCode(application: Application, parameters: URLSearchParams): Promise<TokenReply> {
    const code = parameters.get("code") ?? "";
    const grant = this.#codes.get(code);
    this.#codes.delete(code); // for one use (RFC 6749 §4.1.2), a failed one included
    if (grant?.application !== application || grant.redirectUri !== parameters.get("redirect_uri")) {
      throw new OAuthError("invalid_grant", "Invalid authorization code", 403);
    }
    const verifier = parameters.get("code_verifier") ?? "";
    const challenge = grant.codeChallengeMethod === "S256"
      ? createHash("sha256").update(verifier).digest("base64url")
      : verifier;
    if (grant.codeChallenge && grant.codeChallenge !== challenge) {
      throw new OAuthError("invalid_grant", "Failed to verify code verifier", 403);
    }
    this.#log("seacft", "Success Exchange: authorization code for access token");
    return this.#issueTokens(grant, "oidc-basic-profile");
  }

  /** Each refresh token is for one use. A second use means theft, and ends all its kin (RFC 9700 §4.14.2). */
  #refresh(application: Application, parameters: URLSearchParams): Promise<TokenReply> {
    const refreshToken = this.#refreshTokens.get(parameters.get("refresh_token") ?? "");
    if (refreshToken?.used) refreshToken.grant.revoked = true;
    if (refreshToken?.grant.application !== application || refreshToken.grant.revoked) {
      throw new OAuthError("invalid_grant", "Unknown or invalid refresh token.", 403);
    }
    refreshToken.used = true;
    this.#log("sertft", "Success Exchange: refresh token for access token");
    return this.#issueTokens(refreshToken.grant, "oauth2-refresh-token");
  }

  async #authorizeMachine(application: Application, parameters: URLSearchParams): Promise<TokenReply> {
    const api = this.#findApi(parameters.get("audience"), parameters.get("resource"));
    if (!api || !application.authorizedApis?.includes(api.identifier)) {
      throw new OAuthError("access_denied", `Client is not authorized to access "${api?.identifier}"`, 403);
    }
    const claims = { sub: `${application.clientId}@clients`, gty: "client-credentials" };
    return { access_token: await this.#accessToken(api, application, api.permissions, claims) };
  }

  async #issueTokens(grant: Grant, protocol: string): Promise<TokenReply> {
    const { application, api, user } = grant;
    const scopes = await this.#grantScopes(grant, protocol);
    const mayRefresh = this.#policyScopes(grant).includes("offline_access");
    const refreshToken = randomId();
    if (mayRefresh) this.#refreshTokens.set(refreshToken, { grant, used: false });
    const permissions = api?.enableRbac && { permissions: this.#permissions(grant) };
    return {
      access_token: await this.#accessToken(api, application, scopes, { sub: user.sub, ...permissions }),
      ...(mayRefresh && { refresh_token: refreshToken }),
      ...(scopes.includes("openid") && {
        id_token: await this.sign({
          sub: user.sub,
          aud: application.clientId,
          azp: undefined,
          scope: undefined,
          ...(scopes.includes("profile") && { name: user.name }),
          ...(scopes.includes("email") && { email: user.email, email_verified: true }),
        }),
      }),
      scope: scopes.join(" "),
    };
  }

  /** What is granted in the end: the policies first, then the Action, which may go past them. */
  async #grantScopes(grant: Grant, protocol: string): Promise<string[]> {
    const { application, requestedScopes } = grant;
    const granted = new Set(this.#policyScopes(grant));
    if (this.settings.postLoginAction) {
      await this.#action({ transaction: { protocol, requested_scopes: requestedScopes } }, {
        accessToken: {
          addScope: (scope) => {
            // OIDC scopes of a strict client are not processed, wherever they come from.
            if (application.party !== "strict" || !OIDC_SCOPES.includes(scope)) granted.add(scope);
          },
        },
      });
    }
    return [...granted];
  }

  /** What Auth0 grants of what was asked. */
  #policyScopes(grant: Grant): string[] {
    const { application, api } = grant;
    const permissions = this.#permissions(grant);
    return grant.requestedScopes.filter((scope) => {
      if (scope === "offline_access") return api?.allowOfflineAccess ?? true;
      if (OIDC_SCOPES.includes(scope)) {
        return application.party !== "strict" && STANDARD_SCOPES.includes(scope);
      }
      return permissions.includes(scope);
    });
  }

  #permissions({ application, api, user }: Grant): string[] {
    const allowed = application.party === "strict"
      ? api?.defaultPermissionsForThirdPartyApplications
      : api?.permissions;
    return (allowed ?? []).filter((name) => !api?.enableRbac || user.permissions.includes(name));
  }

  /** Without an API the token is for Auth0's own /userinfo and nobody else can read it. */
  #accessToken(
    api: Api | undefined,
    { clientId }: Application,
    scopes: string[],
    claims: JWTPayload,
  ): Promise<string> {
    const userinfo = `${this.issuer}userinfo`;
    if (!api) {
      if (this.settings.userinfoToken === "opaque") return Promise.resolve(randomId());
      return new EncryptJWT({ ...claims, aud: userinfo, azp: clientId, scope: scopes.join(" ") })
        .setProtectedHeader({ alg: "dir", enc: "A256GCM", iss: this.issuer })
        .encrypt(randomBytes(32));
    }
    const profile = api.accessTokenProfile === "rfc9068"
      ? { claims: { azp: undefined, client_id: clientId, jti: randomId() }, header: { typ: "at+jwt" } }
      : { claims: { azp: clientId }, header: { typ: "JWT" } };
    return this.sign({
      aud: scopes.includes("openid") ? [api.identifier, userinfo] : api.identifier,
      scope: scopes.join(" "),
      ...profile.claims,
      ...claims,
    }, { header: profile.header });
  }

  #log(type: string, description: string): void {
    this.logs.push({ type, description });
  }
}

/**
 * Starts a tenant on loopback.
 *
 * @param settings What differs from a new permissive tenant.
 * @param port 0 for a free one.
 */
export async function startTenant(settings: Partial<TenantSettings> = {}, port = 0): Promise<Tenant> {
  const tenant = new Tenant(
    { ...newTenant(settings.kind ?? "permissive"), ...settings },
    await newSigningKey(),
  );
  await tenant.listen(port);
  return tenant;
}

/**
 * Does what a user does in the browser: opens the page, fills it in, accepts.
 *
 * @returns Where the browser is sent then: the client's callback URL.
 * @throws With the text of the page, where it is an error page.
 */
export async function signIn(
  authorizeUrl: URL | string,
  { email }: Pick<User, "email">,
  decision: "accept" | "decline" = "accept",
): Promise<URL> {
  const page = await fetch(authorizeUrl);
  if (!page.ok) throw new Error(pageText(await page.text()));
  const form = new URLSearchParams({ email, decision });
  const reply = await fetch(authorizeUrl, { method: "POST", body: form, redirect: "manual" });
  const location = reply.headers.get("location");
  if (!location) throw new Error(pageText(await reply.text()));
  return new URL(location);
}

function signInPage({ name }: Application, scopes: string[], problem = ""): Response {
  return page(
    "Log in",
    `<p>${escapeHtml(name)} asks for access to your account. This stand-in tenant needs no password.</p>
<p role="alert">${problem}</p>
<form method="post">
<p><label>Email address <input name="email" type="email" autocomplete="username" required autofocus></label></p>
<p>It will be allowed:</p><ul>${scopes.map((scope) => `<li>${escapeHtml(scope)}</li>`).join("")}</ul>
<button name="decision" value="accept">Accept</button>
<button name="decision" value="decline" formnovalidate>Decline</button>
</form>`,
    problem ? 400 : 200,
  );
}

function errorPage(details: string, status: number): Response {
  return page("Oops!, something went wrong", escapeHtml(details), status);
}

function page(title: string, body: string, status: number): Response {
  const html = `<!doctype html><html lang="en"><head><meta charset="utf-8"><title>${title}</title></head>
<body><main><h1>${title}</h1>${body}</main></body></html>`;
  return new Response(html, { status, headers: { "content-type": "text/html; charset=utf-8" } });
}

/** For text between tags only. */
function escapeHtml(value: string): string {
  return value.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

/** The visible text of a page, in one line. */
function pageText(html: string): string {
  const [body = ""] = /<main>.*<\/main>/s.exec(html) ?? [];
  return body.replace(/<[^>]+>/g, " ").replace(/\s+/g, " ").trim();
}

/** Reads a token request: a form or JSON, the client in it or in the Authorization header. */
async function readParameters(request: IncomingMessage): Promise<URLSearchParams> {
  const body = await text(request);
  const isJson = request.headers["content-type"]?.startsWith("application/json");
  const parameters = new URLSearchParams(isJson ? JSON.parse(body) : body);
  const [, basic] = /^Basic (.+)$/.exec(request.headers.authorization ?? "") ?? [];
  if (basic) {
    const [clientId = "", clientSecret = ""] = Buffer.from(basic, "base64").toString().split(":");
    parameters.set("client_id", decodeURIComponent(clientId));
    parameters.set("client_secret", decodeURIComponent(clientSecret));
  }
  return parameters;
}

/** A callback on loopback may use any port (RFC 8252 §7.3). */
function withoutLoopbackPort(url: string): string {
  return url.replace(/^(http:\/\/(?:localhost|127\.0\.0\.1|\[::1\])):\d+/, "$1");
}

function randomId(): string {
  return randomUUID().replaceAll("-", "");
}
