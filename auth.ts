/**
 * Finds out who is calling: takes the `Authorization` header and gives a `Caller`. The numbers are those of the
 * diagram in the README, How it works:
 *
 *   1  A call without a token is answered 401; the challenge names the metadata document (RFC 9728 §5.1).
 *   2  The metadata document names Auth0 as the authorization server (RFC 9728 §2).
 *   3-6  Discovery, registration, sign-in and token are between ChatGPT and Auth0, and need no code here.
 *   7  From then on each call carries an access token, which `authenticate` checks.
 *
 * Knows nothing of tools. A token is never passed on, logged or quoted; a refusal may name its issuer and audience.
 */
import { hash } from "node:crypto";
import { createRemoteJWKSet, errors, jwtVerify } from "jose";
import type { JWTPayload, JWTVerifyGetKey } from "jose";

/** What this server is to Auth0 and to clients. */
export interface ProtectedResource {
  /** `https://<domain>/`, with the slash: `iss` is compared character for character (RFC 7519 §4.1.1). */
  issuer: string;
  /** MCP_SERVER_URL: the metadata's `resource`, the token's audience and Auth0's API Identifier in one. */
  url: string;
  /** For people, in the metadata. */
  name: string;
  /** The scopes that the metadata and the challenge tell clients to ask for. */
  scopes: readonly string[];
}

/** What the rest of the server may know of a verified token. */
export interface Caller {
  /**
   * The `sub` claim: `auth0|…` for a person, `<client id>@clients` for a machine. It is unique within one issuer only
   * (OpenID Connect Core §2): to accept several issuers, add `iss` to it. It is the same in all of a user's
   * organizations: to separate their data, add the claim `org_id`, which this server does not read.
   */
  subject: string;
  /** Those of the claim `scope`, and of `permissions`, where Auth0 puts RBAC permissions. */
  scopes: ReadonlySet<string>;
  /** `name`, `email` and `nickname`, as far as the token has them. */
  profile: Record<string, string>;
  /** The claims that decide, for the log. */
  claims: Record<string, unknown>;
}

/** A refusal of the HTTP request. The message says what is wrong and, where there is one, which README step helps. */
export class HttpError extends Error {
  override readonly name = "HttpError";
  readonly status: number;
  readonly headers: Record<string, string>;
  /** The `code` of the JSON-RPC error in the body. */
  readonly code: number;

  constructor(status: number, message: string, { headers = {}, code = -32000, cause }: Partial<HttpError> = {}) {
    super(message, { cause });
    this.status = status;
    this.headers = headers;
    this.code = code;
  }
}

// ------------------------------------------------------------------------------------- 1, 2: where to sign in

/** The protected resource metadata document (RFC 9728 §2). */
export function protectedResourceMetadata({ issuer, url, name, scopes }: ProtectedResource) {
  return {
    resource: url,
    authorization_servers: [issuer],
    scopes_supported: scopes,
    bearer_methods_supported: ["header"],
    resource_name: name,
  };
}

/** The URL of the document: the well-known path stands between host and path (RFC 9728 §3.1). */
export function metadataUrl(resourceUrl: string): string {
  const { origin, pathname } = new URL(resourceUrl);
  return `${origin}/.well-known/oauth-protected-resource${pathname}`;
}

/**
 * The value of a `WWW-Authenticate` header. It holds `scope`, too, since clients look there before the metadata
 * (MCP 2025-11-25, Authorization, Scope Selection Strategy).
 *
 * @param error `error` and `error_description`; none when no token was sent (RFC 6750 §3.1).
 */
export function challenge({ url, scopes }: ProtectedResource, error: Record<string, string> = {}): string {
  const parameters = { ...error, resource_metadata: metadataUrl(url), scope: scopes.join(" ") };
  // RFC 6750 §3 allows printable ASCII without quotes and backslashes.
  const quote = (text: string) => `"${text.replace(/["\\]/g, "'").replace(/[^ -~]/g, "?")}"`;
  return `Bearer ${Object.entries(parameters).map(([name, text]) => `${name}=${quote(text)}`).join(", ")}`;
}

// ----------------------------------------------------------------------------------------- 7: who is calling

const REMEMBER_MS = 60_000;
const REMEMBER_AT_MOST = 10_000; // tokens

/**
 * Makes `authenticate`, which turns the value of the `Authorization` header into a `Caller`. It throws `HttpError`:
 * 401 when the token is missing or at fault; 503 when the signing keys cannot be had, since a 401 would send the user
 * to sign in again.
 */
export function createAuthenticator(resource: ProtectedResource) {
  const jwksUrl = new URL(".well-known/jwks.json", resource.issuer);
  // jose keeps keys for ten minutes (its default); an unknown `kid` makes it read them again, at most every 5 s.
  const keys = createRemoteJWKSet(jwksUrl, { timeoutDuration: 3_000, cooldownDuration: 5_000 });
  // Clients send the same token many times, and checking it takes 70 µs on Node 24, 300 µs on Deno. The map's key is a
  // digest, so that no token is kept. Refused tokens are not remembered: anyone could fill the map with them.
  const verified = new Map<string, { caller: Caller; until: number }>();

  return async function authenticate(authorization: string | undefined): Promise<Caller> {
    const token = bearerToken(authorization, resource);
    const digest = hash("sha256", token, "base64");
    const known = verified.get(digest);
    if (known !== undefined && Date.now() < known.until) return known.caller;
    const claims = await verifyToken(token, resource, keys);
    const caller = toCaller(claims);
    if (verified.size >= REMEMBER_AT_MOST) verified.clear(); // the others are checked once more
    verified.set(digest, { caller, until: Math.min(Date.now() + REMEMBER_MS, claims.exp * 1000) });
    return caller;
  };
}

type Claims = JWTPayload & { sub: string; exp: number };

/** The token from the header, and from nowhere else: never from the query string (RFC 9700 §4.3.2). */
function bearerToken(authorization: string | undefined, resource: ProtectedResource): string {
  const token = /^bearer +(\S.*)$/i.exec(authorization ?? "")?.[1];
  if (token !== undefined) return token;
  const found = authorization === undefined ? "is missing" : "is not 'Bearer <token>'";
  throw new HttpError(401, `Sign in first: Authorization ${found}. The resource_metadata URL says where`, {
    headers: { "WWW-Authenticate": challenge(resource) },
  });
}

/**
 * Checks an access token of either of Auth0's profiles (header `typ` JWT or at+jwt).
 *
 * Only RS256: taking the algorithm from the token would let the caller choose the check (RFC 8725 §3.1). Only the
 * tenant's keys: `jku`, `x5u` and `jwk` in the token are ignored (§3.10). Only our own URL as audience: a token for
 * another API is refused (§3.9, RFC 8707 §2).
 */
async function verifyToken(token: string, resource: ProtectedResource, keys: JWTVerifyGetKey): Promise<Claims> {
  const parts = token.split(".").length;
  if (parts === 5) throw invalidToken(resource, `Token is encrypted (a JWE of 5 parts): ${NO_AUDIENCE}`);
  if (parts !== 3) throw invalidToken(resource, `Token is opaque, not a JWT: ${NO_AUDIENCE}`);
  const { payload, protectedHeader } = await jwtVerify<Claims>(token, keys, {
    algorithms: ["RS256"],
    issuer: resource.issuer,
    audience: resource.url,
    requiredClaims: ["exp"], // and `sub`, below
    clockTolerance: 5, // seconds between Auth0's clock and ours
  }).catch((error: unknown) => {
    throw toHttpError(error, resource);
  });
  // The same keys sign other kinds of JWT, such as logout tokens (RFC 8725 §3.11, RFC 9068 §4).
  const isAccessToken = /^(application\/)?(at\+)?jwt$/i.test(protectedHeader.typ ?? "JWT");
  if (!isAccessToken) throw invalidToken(resource, "Token has another typ than JWT or at+jwt");
  // A database may replace half a surrogate pair, or cut text at NUL: two users could then become one.
  const { sub } = payload;
  const isUsable = typeof sub === "string" && sub !== "" && sub.isWellFormed() && !sub.includes("\0");
  if (!isUsable) throw invalidToken(resource, "Token lacks a usable sub claim");
  return payload;
}

function toCaller(payload: Claims): Caller {
  const { sub, iss, aud, azp, client_id, scope, permissions, exp } = payload;
  const profile: Caller["profile"] = {};
  for (const [claim, value] of Object.entries(payload)) {
    // Auth0 puts an Action's custom claims under a namespace: `https://…/email`.
    const name = /^(?:https?:.*\/)?(name|email|nickname)$/.exec(claim)?.[1];
    if (name !== undefined && typeof value === "string") profile[name] = value.toWellFormed();
  }
  return {
    subject: sub,
    scopes: new Set([scope, permissions].flat().join(" ").split(" ")), // "a b" and ["c", "d"]
    profile,
    claims: { iss, aud, azp, client_id, scope, permissions, exp },
  };
}

// ------------------------------------------------------------------------------------ what a refusal means

const NO_AUDIENCE = "Auth0 did not know for which API it was. Set the Default Audience, README Step 2";
const MALFORMED = "Token is malformed: it has three parts as a JWT does, but they cannot be read as one";

/** The message for each of jose's error codes that are the token's fault. Any other error is answered 503. */
const TOKEN_ERRORS: Record<string, string> = {
  ERR_JWT_EXPIRED: "Token has expired: refresh it, or sign in again",
  ERR_JOSE_ALG_NOT_ALLOWED: "Token is not signed with RS256: choose it as Signing Algorithm of the API, README Step 1",
  ERR_JWS_SIGNATURE_VERIFICATION_FAILED: "Token's signature does not fit its content: it was altered, or forged",
  ERR_JWKS_NO_MATCHING_KEY: "Token is signed with a key that AUTH0_DOMAIN does not publish: it comes from another " +
    "tenant, or from before a key was revoked. Compare AUTH0_DOMAIN, README Step 0",
  ERR_JWKS_MULTIPLE_MATCHING_KEYS: "Token does not say which of the tenant's keys has signed it: its kid is missing",
  ERR_JWS_INVALID: MALFORMED,
  ERR_JWT_INVALID: MALFORMED,
  ERR_JOSE_NOT_SUPPORTED: MALFORMED, // a critical header (`crit`) that jose does not know
};

function toHttpError(error: unknown, resource: ProtectedResource): HttpError {
  if (error instanceof errors.JWTClaimValidationFailed) return invalidToken(resource, explainClaim(error, resource));
  const meaning = error instanceof errors.JOSEError ? TOKEN_ERRORS[error.code] : undefined;
  if (meaning !== undefined) return invalidToken(resource, meaning);
  const message = `Auth0's signing keys cannot be had from ${resource.issuer}.well-known/jwks.json: try again`;
  return new HttpError(503, message, { headers: { "Retry-After": "5" }, cause: error });
}

/** jose checks the signature before the claims, so the values quoted here were signed by the tenant. */
function explainClaim({ claim, payload }: errors.JWTClaimValidationFailed, { issuer, url }: ProtectedResource): string {
  switch (claim) {
    case "iss":
      return `Token has the issuer ${payload.iss ?? "(none)"}, expected ${issuer}: compare AUTH0_DOMAIN, README Step 0`;
    case "nbf":
      return "Token is not valid yet: its nbf claim lies ahead. Compare the server's clock";
    case "aud": {
      const advice = String(payload.aud) === `${issuer}userinfo`
        ? "it is for Auth0's own userinfo. Set the Default Audience, README Step 2"
        : "send the access token, and let the API Identifier equal MCP_SERVER_URL, README Step 1";
      return `Token has the audience ${payload.aud ?? "(none)"}, expected ${url}: ${advice}`;
    }
    default:
      return `Token lacks a usable ${claim} claim`;
  }
}

/** Takes no cause, which would go into the log: messages of jose and of JSON.parse can quote the token. */
function invalidToken(resource: ProtectedResource, message: string): HttpError {
  const error = { error: "invalid_token", error_description: message };
  return new HttpError(401, message, { headers: { "WWW-Authenticate": challenge(resource, error) } });
}

/** What went wrong, for the log, with causes: fetch says only "fetch failed", and its cause says why. */
export function describeError(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  if (error instanceof AggregateError) return error.errors.map(describeError).join(", "); // one per address of a host
  const cause = error.cause instanceof Error ? `: ${describeError(error.cause)}` : "";
  return `${error.message || error.name}${cause}`.replace(/\s+/g, " ");
}
