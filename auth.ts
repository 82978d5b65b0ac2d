/**
 * Who is calling: all that lies between the `Authorization` header and a `Caller`.
 *
 *   1  A call without a token is answered 401; the challenge names the metadata document (RFC 9728 §5.1).
 *   2  The metadata document names Auth0 as the authorization server (RFC 9728 §2).
 *   3-6  Discovery, registration, sign-in and token are between ChatGPT and Auth0; nothing of them is here.
 *   7  From then on each call carries an access token, which `createAuthenticator`'s function checks.
 *
 * Knows nothing of tools. A token is never passed on, logged or quoted; a refusal may name its issuer and audience.
 */
import { hash } from "node:crypto";
import { createRemoteJWKSet, decodeJwt, errors, jwtVerify } from "jose";
import type { JWTPayload, JWTVerifyGetKey } from "jose";

/** What this server is to Auth0 and to clients. */
export interface ProtectedResource {
  /** `https://<domain>/`, with the slash: `iss` is compared character for character (RFC 7519 §4.1.1). */
  issuer: string;
  /** MCP_SERVER_URL: the metadata's `resource`, the token's audience and Auth0's API Identifier in one. */
  url: string;
  /** For people, in the metadata. */
  name: string;
  /** What a client should ask for. Clients that read it ask for exactly this. */
  scopes: readonly string[];
}

/** What the rest of the server may know of a verified token. */
export interface Caller {
  /**
   * The `sub` claim: `auth0|…` for a person, `<client id>@clients` for a machine. It is unique within one issuer only
   * (OpenID Connect Core §2): to accept several, keep `iss` with it. It is the same in all of a user's organizations:
   * to keep their data apart, keep the claim `org_id` with it, which is not looked at here.
   */
  subject: string;
  /** The claims `scope` and `permissions` together: Auth0 puts RBAC permissions into the latter. */
  scopes: ReadonlySet<string>;
  /** `name`, `email` and `nickname`, as far as the token has them. */
  profile: Record<string, string>;
  /** The claims that decided, for the debug log. */
  claims: Record<string, unknown>;
}

/** A request refused before any tool ran. The message says what is wrong, what was expected and which step mends it. */
export class HttpError extends Error {
  override readonly name = "HttpError";
  readonly status: number;
  readonly headers: Record<string, string>;

  constructor(status: number, message: string, headers: Record<string, string> = {}, cause?: unknown) {
    super(message, { cause });
    this.status = status;
    this.headers = headers;
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

/** Where the document lies: the well-known path goes between host and path (RFC 9728 §3.1). */
export function metadataUrl(resourceUrl: string): string {
  const { origin, pathname } = new URL(resourceUrl);
  return `${origin}/.well-known/oauth-protected-resource${pathname}`;
}

/**
 * The value of a `WWW-Authenticate` header. `scope` is part of it since clients prefer it to the metadata's
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

// A client sends one token many times, and to check a signature takes 0.07 ms on Node 24 and 0.3 ms on Deno.
const REMEMBER_MS = 60_000;
const REMEMBER_AT_MOST = 10_000;

/**
 * Makes the function that says who is calling.
 *
 * @param warn Takes a line for the operator when Auth0's keys cannot be read and the known ones have to do.
 * @returns Takes the `Authorization` header's value. Throws `HttpError`: 401 when the token is missing or at
 *   fault; 503 when the signing keys cannot be had, since a 401 would send the user to sign in again.
 */
export function createAuthenticator(resource: ProtectedResource, warn: (line: string) => void) {
  const keys = signingKeys(resource, warn);
  // Keyed by digest, so that no token is kept. Refused tokens are not remembered: anyone could fill the map with them.
  const verified = new Map<string, { caller: Caller; until: number }>();

  return async function authenticate(authorization: string | undefined): Promise<Caller> {
    const token = bearerToken(authorization, resource);
    const digest = hash("sha256", token, "base64");
    const known = verified.get(digest);
    if (known !== undefined && Date.now() < known.until) return known.caller;
    const payload = await verifyToken(token, resource, keys);
    const caller = toCaller(payload);
    if (verified.size >= REMEMBER_AT_MOST) verified.clear();
    verified.set(digest, { caller, until: Math.min(Date.now() + REMEMBER_MS, payload.exp * 1000) });
    return caller;
  };
}

type Claims = JWTPayload & { sub: string; exp: number };

const CLOCK_TOLERANCE_SECONDS = 5; // between Auth0's clock and ours

/** The token from the header, and from nowhere else: never from the query string (RFC 9700 §4.3.2). */
function bearerToken(authorization: string | undefined, resource: ProtectedResource): string {
  const token = /^bearer +(\S.*)$/i.exec(authorization ?? "")?.[1];
  if (token !== undefined) return token;
  const found = authorization === undefined ? "is missing" : "is not 'Bearer <token>'";
  throw new HttpError(401, `Sign in first: Authorization ${found}. The resource_metadata URL says where`, {
    "WWW-Authenticate": challenge(resource),
  });
}

/**
 * Checks an access token of either of Auth0's profiles (header `typ` JWT or at+jwt).
 *
 * RS256 alone: a token that chose its own algorithm would choose how it is checked (RFC 8725 §3.1). The keys
 * are the tenant's, whatever `jku`, `x5u` or `jwk` the token carries (§3.10). The audience is our own URL, so
 * that a token for another API opens nothing here (§3.9, RFC 8707 §2).
 */
async function verifyToken(token: string, resource: ProtectedResource, keys: JWTVerifyGetKey): Promise<Claims> {
  const parts = token.split(".").length;
  if (parts === 5) throw invalidToken(resource, `Token is encrypted (a JWE of 5 parts): ${NO_AUDIENCE}`);
  if (parts !== 3) throw invalidToken(resource, `Token is opaque, not a JWT: ${NO_AUDIENCE}`);
  try {
    // Most refused tokens have expired. Refused before the signature is checked, one costs 3.5 bare replies, not 6.
    const { exp } = decodeJwt(token);
    if (Number(exp) + CLOCK_TOLERANCE_SECONDS <= Date.now() / 1000) throw invalidToken(resource, EXPIRED);
    const { payload, protectedHeader } = await jwtVerify<Claims>(token, keys, {
      algorithms: ["RS256"],
      issuer: resource.issuer,
      audience: resource.url,
      requiredClaims: ["exp", "sub"],
      clockTolerance: CLOCK_TOLERANCE_SECONDS,
    });
    // Other kinds of JWT come from the same keys: logout tokens, DPoP proofs (RFC 8725 §3.11, RFC 9068 §4).
    const isAccessToken = /^(application\/)?(at\+)?jwt$/i.test(protectedHeader.typ ?? "JWT");
    if (!isAccessToken) throw invalidToken(resource, "Token has another typ than JWT or at+jwt");
    if (typeof payload.sub !== "string" || !payload.sub) throw invalidToken(resource, "Token lacks a usable sub claim");
    return payload;
  } catch (error) {
    throw error instanceof HttpError ? error : explain(error, resource);
  }
}

function toCaller(payload: Claims): Caller {
  const { sub, iss, aud, azp, client_id, scope, permissions, exp } = payload;
  const profile: Caller["profile"] = {};
  for (const [claim, value] of Object.entries(payload)) {
    // Auth0 puts an Action's custom claims under a namespace: `https://…/email`.
    const name = /^(?:https?:.*\/)?(name|email|nickname)$/.exec(claim)?.[1];
    if (name !== undefined && typeof value === "string") profile[name] = value;
  }
  return {
    subject: sub,
    scopes: new Set([scope, permissions].flat().join(" ").split(" ")),
    profile,
    claims: { iss, aud, azp, client_id, scope, permissions, exp },
  };
}

// ------------------------------------------------------------------------------------ what a refusal means

const NO_AUDIENCE = "Auth0 did not know for which API it was. Set the Default Audience, README Step 2";
const EXPIRED = "Token has expired: refresh it, or sign in again";
const MALFORMED = "Token is malformed: it has three parts as a JWT does, but they cannot be read as one";

/** What is the token's own fault, by jose's code. Every other error means that no key could be had. */
const MEANINGS: Record<string, string> = {
  ERR_JWT_EXPIRED: EXPIRED,
  ERR_JOSE_ALG_NOT_ALLOWED: "Token is not signed with RS256: choose it as Signing Algorithm of the API, README Step 1",
  ERR_JWS_SIGNATURE_VERIFICATION_FAILED: "Token's signature does not fit its content: it was altered, or forged",
  ERR_JWKS_NO_MATCHING_KEY: "Token is signed with a key that AUTH0_DOMAIN does not publish: it comes from another " +
    "tenant, or from before a key was revoked. Compare AUTH0_DOMAIN, README Step 0",
  ERR_JWKS_MULTIPLE_MATCHING_KEYS: "Token does not say which of the tenant's keys has signed it: its kid is missing",
  ERR_JWS_INVALID: MALFORMED,
  ERR_JWT_INVALID: MALFORMED,
  ERR_JOSE_NOT_SUPPORTED: MALFORMED,
};

function explain(error: unknown, resource: ProtectedResource): HttpError {
  if (error instanceof errors.JWTClaimValidationFailed) return invalidToken(resource, explainClaim(error, resource));
  const meaning = error instanceof errors.JOSEError ? MEANINGS[error.code] : undefined;
  if (meaning !== undefined) return invalidToken(resource, meaning);
  const message = `Auth0's signing keys cannot be had from ${keySetUrl(resource)}: try again`;
  return new HttpError(503, message, { "Retry-After": "5" }, error);
}

/** jose checks claims after the signature, so what is quoted here was written by the tenant. */
function explainClaim({ claim, payload }: errors.JWTClaimValidationFailed, { issuer, url }: ProtectedResource): string {
  switch (claim) {
    case "iss":
      return `Token has the issuer ${payload.iss ?? "(none)"}, expected ${issuer}: compare AUTH0_DOMAIN, README Step 0`;
    case "nbf":
      return "Token is not valid yet: its nbf claim lies ahead. Compare the server's clock";
    case "aud":
      return `Token has the audience ${payload.aud ?? "(none)"}, expected ${url}: ` +
        (String(payload.aud) === `${issuer}userinfo`
          ? "it is for Auth0's own userinfo. Set the Default Audience, README Step 2"
          : "send the access token, and let the API Identifier equal MCP_SERVER_URL, README Step 1");
    default:
      return `Token lacks a usable ${claim} claim`;
  }
}

/** Without a cause: jose's and JSON's own messages can quote the token, and causes go into the log. */
function invalidToken(resource: ProtectedResource, message: string): HttpError {
  const error = { error: "invalid_token", error_description: message };
  return new HttpError(401, message, { "WWW-Authenticate": challenge(resource, error) });
}

// ---------------------------------------------------------------------------------------------- signing keys

const keySetUrl = ({ issuer }: ProtectedResource) => `${issuer}.well-known/jwks.json`;

/**
 * The tenant's signing keys: jose's remote key set, where known keys serve for up to an hour, so that an outage of
 * Auth0's is not ours. While calls come in they are read again every five minutes, so that a withdrawn key does not
 * serve for that hour too. An unknown `kid` makes jose ask again: once in five seconds while Auth0 answers, and one
 * request at a time while it does not.
 */
function signingKeys(resource: ProtectedResource, warn: (line: string) => void): JWTVerifyGetKey {
  const MINUTE_MS = 60_000;
  const keys = createRemoteJWKSet(new URL(keySetUrl(resource)), {
    timeoutDuration: 3_000,
    cooldownDuration: 5_000,
    cacheMaxAge: 60 * MINUTE_MS,
  });
  let readAgainAt = Date.now() + 5 * MINUTE_MS;
  return async (header, token) => {
    if (keys.fresh && Date.now() >= readAgainAt) {
      readAgainAt = Date.now() + 5 * MINUTE_MS;
      await keys.reload().catch((error: unknown) =>
        warn(`${keySetUrl(resource)} cannot be read (${describeError(error)}): the known keys serve for up to an hour`)
      );
    }
    try {
      return await keys(header, token);
    } catch (error) {
      if (keys.jwks()?.keys.length === 0) throw new Error("the key set is empty", { cause: error });
      throw error;
    }
  };
}

/** What went wrong, for the log: fetch hides the cause of a network failure one level down. */
export function describeError(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  if (error instanceof AggregateError) return error.errors.map(describeError).join(", "); // one for each address of a host
  const cause = error.cause instanceof Error ? `: ${describeError(error.cause)}` : "";
  return `${error.message || error.name}${cause}`.replace(/\s+/g, " ");
}
