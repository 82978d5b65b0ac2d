/**
 * A stand-in for an Auth0 tenant, so that the demo and the tests need neither an account nor a network.
 *
 * NOT FOR PRODUCTION: it asks for no password, keeps everything in memory and listens on loopback only.
 *
 * What a request passes, in the order of the file: discovery and keys, registration, authorize with the
 * sign-in and consent page, the token endpoint, and the scopes and tokens that come out of it. Settings
 * have the names of Auth0's dashboard and can be changed at any time (`tenant-settings.ts`). Behaviour follows
 * Auth0's documentation and what users report (README, "What was tried"); error messages that nobody has quoted are
 * worded by this project.
 *
 * The Management API is that of `management.ts`, on the same settings.
 *
 * Left out: /userinfo, /oauth/revoke, sessions, rate limits, custom domains, organizations, Rules and every grant
 * but the three of the token endpoint.
 */
import { createHash, randomBytes, randomUUID } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:http";
import type { IncomingHttpHeaders, IncomingMessage, Server, ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { text } from "node:stream/consumers";
import { compileFunction } from "node:vm";
import { OAuthClientMetadataSchema } from "@modelcontextprotocol/sdk/shared/auth.js";
import * as jose from "jose";
import { answerManagement, MANAGEMENT_SCOPES } from "./management.ts";
import { errorPage, pageText, signInPage } from "./tenant-pages.ts";
import { ACTION_CODE, ALICE, newTenant, OIDC_SCOPES } from "./tenant-settings.ts";
import type { Api, Application, TenantSettings, User } from "./tenant-settings.ts";

export * from "./tenant-settings.ts";

/** The scopes of OpenID Connect Core §5.4, which Auth0 grants for an API of one's own without an Action. */
const STANDARD_SCOPES = ["openid", "profile", "email", "address", "phone"];

/** Parameters of /authorize that Auth0 documents: to a strict client any other is an error. */
const AUTHORIZE_PARAMETERS = (
  "response_type client_id redirect_uri scope state code_challenge code_challenge_method audience resource " +
  "nonce prompt max_age login_hint ui_locales acr_values display authorization_details correlation_id dpop_jkt " +
  "response_mode connection organization"
).split(" ");

/** Shown to strict clients only: a permissive one gets a token that nobody but Auth0 can read. */
const USERINFO_REFUSED =
  "The userinfo audience is not allowed for third party clients. Please specify a valid API audience.";

const JWT_BEARER = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

const TOKEN_LIFETIME_SECONDS = 86_400;

/** A post-login Action, with the parts of `event` and `api` that this project's uses. */
export type PostLoginAction = (
  event: {
    transaction?: { protocol?: string; requested_scopes?: string[] };
    resource_server?: unknown;
    user?: unknown;
  },
  api: { accessToken: { addScope(scope: string): void; setCustomClaim?(name: string, value: unknown): void } },
) => Promise<void>;

/** Loads an Action as Auth0 does: the pasted text, run as a CommonJS module without anything to require. */
export function loadAction(code = ACTION_CODE): PostLoginAction {
  const exports: { onExecutePostLogin?: PostLoginAction } = {};
  compileFunction(code, ["exports"])(exports);
  if (!exports.onExecutePostLogin) throw new Error("auth0-action.js exports no onExecutePostLogin");
  return exports.onExecutePostLogin;
}

async function newSigningKey() {
  const { privateKey, publicKey } = await jose.generateKeyPair("RS256");
  const kid = randomId();
  return { kid, privateKey, publicJwk: { ...await jose.exportJWK(publicKey), kid, use: "sig", alg: "RS256" } };
}

type SigningKey = Awaited<ReturnType<typeof newSigningKey>>;

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

/** What a user has agreed to. Every refresh token that descends from it dies with `revoked`. */
interface Grant extends AuthorizationRequest {
  user: User;
  revoked: boolean;
}

interface ReadRequest {
  /** Method and path. */
  route: string;
  headers: IncomingHttpHeaders;
  body: string;
}

export class Tenant {
  readonly settings: TenantSettings;
  /** Monitoring → Logs, oldest first: failures, all of the type `f` here, and exchanged codes. */
  readonly logs: { type: "f" | "seacft"; description: string }[] = [];
  /** How often the key set was asked for. */
  jwksRequests = 0;
  /** Answers requests for the key set instead of the tenant, to make them fail. */
  answerJwks: ((response: ServerResponse) => void) | undefined;
  /** Breaks the promise that the metadata makes when the issuer is to be included in authorization responses. */
  withholdsIssuer = false;
  /** Runs instead of the Management API, to make it fail: `request` is method and path, `answer` runs the API. */
  beforeManagement = (_request: string, answer: () => Promise<Response>): Promise<Response> => answer();
  /** Runs instead of every answer, to change it: `answer` gives the tenant's own. */
  beforeAnswer = (_request: ReadRequest, answer: () => Promise<Response>): Promise<Response> | Response => answer();

  readonly #server: Server;
  readonly #action = loadAction();
  /** The current one first. */
  #signingKeys: [SigningKey, ...SigningKey[]];
  readonly #codes = new Map<string, Grant>();
  /** A refresh token that has been used stays, so that its reuse is noticed. */
  readonly #refreshTokens = new Map<string, { grant: Grant; usedAt?: number }>();

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
    { header, key }: { header?: Partial<jose.JWTHeaderParameters>; key?: Parameters<jose.SignJWT["sign"]>[0] } = {},
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
    return new jose.SignJWT(payload).setProtectedHeader({ alg: "RS256", typ: "JWT", kid, ...header })
      .sign(key ?? privateKey);
  }

  /** A token as Dashboard → Applications → APIs → Auth0 Management API → API Explorer shows it. */
  signManagementToken(claims: Record<string, unknown> = {}): Promise<string> {
    const scope = MANAGEMENT_SCOPES.join(" ");
    return this.sign({ aud: `${this.issuer}api/v2/`, sub: "explorer@clients", scope, ...claims });
  }

  /** Applications → Create Application → Import from URL. Auth0 takes https only; here loopback is fine. */
  async importFromUrl(url: string): Promise<void> {
    const document = OAuthClientMetadataSchema.parse(await (await fetch(url)).json());
    const { client_name, redirect_uris, token_endpoint_auth_method, jwks, jwks_uri } = document;
    this.settings.applications.push({
      clientId: `tpc_${randomId()}`,
      externalClientId: url,
      name: client_name ?? url,
      party: "strict", // whatever the tenant's kind
      callbackUrls: redirect_uris,
      grantTypes: ["authorization_code", "refresh_token"],
      ...(token_endpoint_auth_method === "private_key_jwt" && (jwks_uri ? { jwksUri: jwks_uri } : { jwks })),
    });
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const { pathname, searchParams } = new URL(request.url ?? "/", this.origin);
    // Scripts of any origin may read every answer but the sign-in page.
    if (pathname !== "/authorize") response.setHeader("access-control-allow-origin", "*");
    if (pathname === "/.well-known/jwks.json") {
      this.jwksRequests++;
      if (this.answerJwks) return this.answerJwks(response);
    }
    const read = { route: `${request.method} ${pathname}`, headers: request.headers, body: await text(request) };
    const reply = await this.beforeAnswer(read, () => this.#reply(read, searchParams));
    response.writeHead(reply.status, Object.fromEntries(reply.headers)).end(await reply.text());
  }

  #reply(request: ReadRequest, query: URLSearchParams): Promise<Response> {
    return this.#route(request, query).catch((error: unknown) => {
      const known = error instanceof OAuthError ? error : new OAuthError("server_error", `${error}`, 500);
      const { code, message, status } = known;
      this.logs.push({ type: "f", description: message });
      if (request.route.endsWith(" /authorize")) return errorPage(`${code}: ${message}`, status);
      return Response.json({ error: code, error_description: message }, { status });
    });
  }

  async #route(request: ReadRequest, query: URLSearchParams): Promise<Response> {
    const { route, headers, body } = request;
    switch (route) {
      case "GET /.well-known/openid-configuration":
      case "GET /.well-known/oauth-authorization-server":
        return Response.json(this.#metadata());
      case "GET /.well-known/jwks.json":
        return Response.json({ keys: this.#signingKeys.map((key) => key.publicJwk) });
      case "POST /oidc/register":
        return this.#register(body);
      case "GET /authorize":
        return this.#authorize(query);
      case "POST /authorize":
        return this.#authorize(query, new URLSearchParams(body));
      case "POST /oauth/token":
        return this.#token(readParameters(body, headers));
      default:
        if (route.includes(" /api/v2/")) return this.#manage(request, query);
        if (route.startsWith("OPTIONS ")) return preflight(headers);
        throw new OAuthError("not_found", "Not found.", 404);
    }
  }

  #manage({ route, headers: { authorization = "" }, body }: ReadRequest, query: URLSearchParams): Promise<Response> {
    const [method = "", path = ""] = route.split(" ");
    const asked = { method, url: new URL(`${path}?${query}`, this.origin), authorization, body };
    return this.beforeManagement(
      route.replace("/api/v2/", ""),
      () => answerManagement(this.settings, (document) => this.importFromUrl(document), asked),
    );
  }

  /** The same document at both addresses. It lists registration whether or not that is switched on. */
  #metadata(): Record<string, unknown> {
    return {
      issuer: this.issuer,
      authorization_endpoint: `${this.origin}/authorize`,
      token_endpoint: `${this.origin}/oauth/token`,
      jwks_uri: `${this.origin}/.well-known/jwks.json`,
      registration_endpoint: `${this.origin}/oidc/register`,
      scopes_supported: OIDC_SCOPES,
      response_types_supported: ["code"],
      subject_types_supported: ["public"],
      id_token_signing_alg_values_supported: ["RS256"],
      token_endpoint_auth_methods_supported: ["client_secret_basic", "client_secret_post", "private_key_jwt"],
      code_challenge_methods_supported: ["S256", "plain"],
      ...(this.settings.clientIdMetadataDocumentRegistration && { client_id_metadata_document_supported: true }),
      ...(this.settings.includeIssuerInAuthorizationResponses &&
        { authorization_response_iss_parameter_supported: true }),
    };
  }

  /** Dynamic Client Registration (RFC 7591), open to anybody once it is switched on. */
  #register(body: string): Response {
    const { kind, dynamicClientRegistration, applications, applicationLimit } = this.settings;
    if (!dynamicClientRegistration) throw new OAuthError("invalid_request", "Dynamic client registration is disabled");
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
    return Response.json({
      ...metadata,
      client_id: application.clientId,
      ...(application.clientSecret && { client_secret: application.clientSecret, client_secret_expires_at: 0 }),
      grant_types: application.grantTypes,
    }, { status: 201 });
  }

  /** The sign-in and consent page, and with `form` what was filled in there. */
  #authorize(query: URLSearchParams, form?: URLSearchParams): Response {
    const application = this.#checkClient(query);
    let request: AuthorizationRequest;
    try {
      request = this.#checkAuthorizationRequest(application, query);
    } catch (error) {
      // Errors of third-party clients are shown on a page of Auth0's and logged: the client is not told.
      if (!(error instanceof OAuthError) || application.party !== "first-party") throw error;
      return this.#refuse(query, error.code, error.message);
    }
    const signIn = (problem?: string) => signInPage(application, request.requestedScopes, this.settings.users, problem);
    if (!form) return signIn();
    if (form.get("decision") !== "accept") {
      return this.#refuse(query, "access_denied", "User did not authorize the request");
    }
    const user = this.settings.users.find(({ email }) => email === form.get("email"));
    if (!user) return signIn("Wrong email");
    const code = randomId();
    this.#codes.set(code, { ...request, user, revoked: false });
    return this.#callBack(query, { code });
  }

  #refuse(query: URLSearchParams, error: string, description: string): Response {
    this.logs.push({ type: "f", description });
    return this.#callBack(query, { error, error_description: description });
  }

  /** Sends the browser back to the client. */
  #callBack(query: URLSearchParams, answer: Record<string, string>): Response {
    const callback = new URL(query.get("redirect_uri") ?? "");
    const state = query.get("state");
    for (const [name, value] of Object.entries(answer)) callback.searchParams.set(name, value);
    if (state !== null) callback.searchParams.set("state", state);
    const isIssuerIncluded = this.settings.includeIssuerInAuthorizationResponses && !this.withholdsIssuer;
    if (isIssuerIncluded) callback.searchParams.set("iss", this.issuer);
    return new Response(null, { status: 302, headers: { location: callback.href } });
  }

  /** An error here is for the user alone: where to send the browser is not known yet (RFC 6749 §4.1.2.1). */
  #checkClient(query: URLSearchParams): Application {
    const clientId = query.get("client_id") ?? "";
    const application = this.#findApplication(clientId);
    if (!application) throw new OAuthError("invalid_request", `Unknown client: ${clientId}`);
    const redirectUri = query.get("redirect_uri") ?? "";
    if (!application.callbackUrls.some((url) => withoutLoopbackPort(url) === withoutLoopbackPort(redirectUri))) {
      throw new OAuthError("invalid_request", `Callback URL mismatch: ${redirectUri}`);
    }
    return application;
  }

  #checkAuthorizationRequest(application: Application, query: URLSearchParams): AuthorizationRequest {
    const codeChallenge = query.get("code_challenge");
    if (application.party === "strict") {
      const unknown = [...query.keys()].find((name) => !AUTHORIZE_PARAMETERS.includes(name));
      if (unknown) throw new OAuthError("invalid_request", `Unknown parameter: ${unknown}`);
      if (!codeChallenge) throw new OAuthError("invalid_request", "code_challenge is required");
    }
    const api = this.#findApi(query.get("audience"), query.get("resource"));
    if (application.party === "strict") {
      if (!api) throw new OAuthError("invalid_request", USERINFO_REFUSED);
      if (!api.defaultPermissionsForThirdPartyApplications) {
        throw new OAuthError(
          "access_denied",
          `Client "${application.clientId}" is not authorized to access resource server "${api.identifier}"`,
        );
      }
    }
    const isEnabled = ({ name, domainLevel }: TenantSettings["connections"][number]) =>
      application.party === "first-party" ? application.connections?.includes(name) : domainLevel;
    if (!this.settings.connections.some(isEnabled)) {
      throw new OAuthError("invalid_request", "no connections enabled for the client");
    }
    return {
      application,
      redirectUri: query.get("redirect_uri") ?? "",
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
    const application = await this.#authenticateClient(parameters);
    const grantType = parameters.get("grant_type") ?? "";
    if (!application.grantTypes.includes(grantType)) {
      throw new OAuthError("unauthorized_client", `Grant type '${grantType}' not allowed for the client.`, 403);
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

  /** By a signed assertion (RFC 7523 §2.2), by a secret, or, for a public client, by nothing. */
  async #authenticateClient(parameters: URLSearchParams): Promise<Application> {
    try {
      const assertion = parameters.get("client_assertion");
      const clientId = parameters.get("client_id") ?? jose.decodeJwt(assertion ?? "").sub ?? "";
      const application = this.#findApplication(clientId);
      const { jwks, jwksUri, clientSecret } = application ?? {};
      if (jwks ?? jwksUri) {
        if (parameters.get("client_assertion_type") !== JWT_BEARER) throw new Error("Wrong assertion type");
        const keys = jwks ? jose.createLocalJWKSet(jwks) : jose.createRemoteJWKSet(new URL(jwksUri ?? ""));
        await jose.jwtVerify(assertion ?? "", keys, {
          algorithms: ["RS256", "RS384", "PS256"],
          issuer: clientId,
          subject: clientId,
          audience: [this.issuer, `${this.origin}/oauth/token`],
          requiredClaims: ["exp", "jti"],
        });
      } else if (clientSecret !== (parameters.get("client_secret") ?? undefined)) {
        throw new Error("Wrong client secret");
      }
      if (!application) throw new Error(`Unknown client: ${clientId}`);
      return application;
    } catch {
      throw new OAuthError("invalid_client", "Unauthorized", 401);
    }
  }

  #exchangeCode(application: Application, parameters: URLSearchParams): Promise<Record<string, unknown>> {
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
    this.logs.push({ type: "seacft", description: "Success Exchange: authorization code for access token" });
    return this.#issueTokens(grant, "oidc-basic-profile");
  }

  /**
   * Each refresh token is for one use. A second use means theft, and ends all its kin (RFC 9700 §4.14.2), unless it
   * comes within the overlap period, as that of a client does that refreshes several times at once.
   */
  #refresh(application: Application, parameters: URLSearchParams): Promise<Record<string, unknown>> {
    const refreshToken = this.#refreshTokens.get(parameters.get("refresh_token") ?? "");
    const overlapMs = (application.rotationOverlap ?? 0) * 1000;
    if (refreshToken?.usedAt !== undefined && Date.now() - refreshToken.usedAt >= overlapMs) {
      refreshToken.grant.revoked = true;
    }
    if (refreshToken?.grant.application !== application || refreshToken.grant.revoked) {
      throw new OAuthError("invalid_grant", "Unknown or invalid refresh token.", 403);
    }
    refreshToken.usedAt ??= Date.now();
    return this.#issueTokens(refreshToken.grant, "oauth2-refresh-token");
  }

  async #authorizeMachine(application: Application, parameters: URLSearchParams): Promise<Record<string, unknown>> {
    const api = this.#findApi(parameters.get("audience"), parameters.get("resource"));
    if (!api || !application.authorizedApis?.includes(api.identifier)) {
      throw new OAuthError("access_denied", `Client is not authorized to access "${api?.identifier}"`, 403);
    }
    const claims = { sub: `${application.clientId}@clients`, gty: "client-credentials" };
    return { access_token: await this.#accessToken(api, application, api.permissions, claims) };
  }

  async #issueTokens(grant: Grant, protocol: string): Promise<Record<string, unknown>> {
    const { application, api, user } = grant;
    const scopes = await this.#grantScopes(grant, protocol);
    const mayRefresh = this.#policyScopes(grant).includes("offline_access");
    const refreshToken = randomId();
    if (mayRefresh) this.#refreshTokens.set(refreshToken, { grant });
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

  /** The granted scopes: what the policies allow, and what the Action adds to that. */
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

  /** The requested scopes that Auth0 grants without an Action. */
  #policyScopes(grant: Grant): string[] {
    const { application, api } = grant;
    const permissions = this.#permissions(grant);
    const mayRefresh = application.grantTypes.includes("refresh_token") && (api?.allowOfflineAccess ?? true);
    return grant.requestedScopes.filter((scope) => {
      if (scope === "offline_access") return mayRefresh;
      if (!OIDC_SCOPES.includes(scope)) return permissions.includes(scope);
      return application.party !== "strict" && STANDARD_SCOPES.includes(scope);
    });
  }

  #permissions({ application, api, user }: Grant): string[] {
    const isStrict = application.party === "strict";
    const allowed = isStrict ? api?.defaultPermissionsForThirdPartyApplications : api?.permissions;
    return (allowed ?? []).filter((name) => !api?.enableRbac || user.permissions.includes(name));
  }

  /** Without an API the token is for Auth0's own /userinfo and nobody else can read it. */
  #accessToken(
    api: Api | undefined,
    { clientId }: Application,
    scopes: string[],
    claims: jose.JWTPayload,
  ): Promise<string> {
    const userinfo = `${this.issuer}userinfo`;
    if (!api) {
      if (this.settings.userinfoToken === "opaque") return Promise.resolve(randomId());
      return new jose.EncryptJWT({ ...claims, aud: userinfo, azp: clientId, scope: scopes.join(" ") })
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
}

/** The first key of every tenant of this process, since generating one takes longer than the rest of a start. */
let firstSigningKey: Promise<SigningKey> | undefined;

/**
 * Starts a tenant on loopback.
 *
 * @param settings What differs from a new permissive tenant.
 * @param port 0 for a free one.
 */
export async function startTenant(settings: Partial<TenantSettings> = {}, port = 0): Promise<Tenant> {
  const tenant = new Tenant(
    { ...newTenant(settings.kind ?? "permissive"), ...settings },
    await (firstSigningKey ??= newSigningKey()),
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
  const page = await fetch(authorizeUrl, { redirect: "manual" });
  const form = new URLSearchParams({ email, decision });
  const reply = page.ok ? await fetch(authorizeUrl, { method: "POST", body: form, redirect: "manual" }) : page;
  const location = reply.headers.get("location");
  if (!location) throw new Error(pageText(await reply.text()));
  return new URL(location);
}

/** Reads a token request: the client is in the form or in the Authorization header. */
function readParameters(body: string, { authorization = "" }: IncomingHttpHeaders): URLSearchParams {
  const parameters = new URLSearchParams(body);
  const [, basic] = /^Basic (.+)$/.exec(authorization) ?? [];
  if (basic) {
    const [clientId = "", clientSecret = ""] = Buffer.from(basic, "base64").toString().split(":");
    parameters.set("client_id", decodeURIComponent(clientId));
    parameters.set("client_secret", decodeURIComponent(clientSecret));
  }
  return parameters;
}

/** Allows a browser's script all headers, since nothing here depends on cookies. */
function preflight(headers: IncomingHttpHeaders): Response {
  const asked = headers["access-control-request-headers"] ?? "*"; // named, since * does not cover Authorization
  return new Response(null, { status: 204, headers: { "access-control-allow-headers": asked } });
}

/** A callback on loopback may use any port (RFC 8252 §7.3). */
function withoutLoopbackPort(url: string): string {
  return url.replace(/^(http:\/\/(?:localhost|127\.0\.0\.1|\[::1\])):\d+/, "$1");
}

function randomId(): string {
  return randomUUID().replaceAll("-", "");
}
