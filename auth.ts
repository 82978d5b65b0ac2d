/**
 * Who is calling: all that lies between the `Authorization` header and a `Caller`.
 *
 *   1  A call without a token is answered 401; the challenge names the metadata document (RFC 9728 §5.1).
 *   2  The metadata document names Auth0 as the authorization server (RFC 9728 §2).
 *   3-6  Discovery, registration, sign-in and token are between ChatGPT and Auth0; nothing of them is here.
 *   7  From then on each call carries an access token, which `authenticate` checks.
 *
 * Knows nothing of tools. A token is never passed on, logged or quoted.
 */
import { hash } from "node:crypto";
import { createRemoteJWKSet, customFetch, decodeJwt, errors, jwtVerify } from "jose";
import type { FetchImplementation, JWTPayload, JWTVerifyGetKey } from "jose";

/** Where the keys come from, and for which API a token must have been issued. */
export interface Tenant {
  /** `https://<domain>/`, with the slash: `iss` is compared character for character (RFC 7519 §4.1.1). */
  issuer: string;
  /** The API Identifier in Auth0, which is MCP_SERVER_URL. */
  audience: string;
  /** Takes a line for the operator when Auth0 fails us and remembered keys have to do. */
  warn: (line: string) => void;
}

/** What the rest of the server may know of a verified token. */
export interface Caller {
  /** The `sub` claim, the same for every sign-in of one account: `auth0|…` or `<client id>@clients`. */
  subject: string;
  /** `scope` and `permissions` together: Auth0 puts RBAC permissions into the latter. */
  scopes: ReadonlySet<string>;
  profile: { name?: string; email?: string; nickname?: string };
  /** The claims that decided, for the debug log. */
  claims: Record<string, unknown>;
}

/** A request refused before any tool ran. The message teaches: what is wrong, what was expected, which step. */
export class AuthError extends Error {
  override readonly name = "AuthError";
  readonly status: 401 | 503;
  /** RFC 6750 §3.1; undefined when no token was sent, since then a challenge names no error. */
  readonly code: "invalid_token" | undefined;

  constructor(status: 401 | 503, code: "invalid_token" | undefined, message: string, cause?: unknown) {
    super(message, { cause });
    this.status = status;
    this.code = code;
  }
}

/**
 * The protected resource metadata document (RFC 9728 §2).
 *
 * @param scopes What a client should ask for. Clients that read it ask for exactly this.
 */
export function protectedResourceMetadata(tenant: Tenant, name: string, scopes: readonly string[]) {
  return {
    resource: tenant.audience,
    authorization_servers: [tenant.issuer],
    scopes_supported: scopes,
    bearer_methods_supported: ["header"],
    resource_name: name,
  };
}

/** Where the document lies: the well-known path goes between host and path (RFC 9728 §3.1). */
export function metadataUrl(resource: string): string {
  const { origin, pathname } = new URL(resource);
  return `${origin}/.well-known/oauth-protected-resource${pathname}`;
}

/**
 * The value of a `WWW-Authenticate` header.
 *
 * @param parameters `error`, `error_description`, `scope`: none when no token was sent (RFC 6750 §3.1).
 */
export function challenge(resource: string, parameters: Record<string, string> = {}): string {
  const all = Object.entries({ ...parameters, resource_metadata: metadataUrl(resource) });
  return `Bearer ${all.map(([name, value]) => `${name}="${quotable(value)}"`).join(", ")}`;
}

/** RFC 6750 §3 allows printable ASCII without quotes and backslashes; jose's messages have quotes. */
function quotable(text: string): string {
  return text.replace(/["\\]/g, "'").replace(/[^ -~]/g, "?");
}

/** Verified tokens are trusted again without a signature check for this long, and for no longer than they live. */
const REMEMBER_MS = 60_000;
const REMEMBER_AT_MOST = 10_000;

const CLOCK_TOLERANCE_SECONDS = 5; // between Auth0's clock and ours
const EXPIRED = "Token has expired: refresh it, or sign in again";

/**
 * Makes the function that says who is calling.
 *
 * @returns Takes the `Authorization` header's value. Throws `AuthError`: 401 when the token is missing or at
 *   fault; 503 when the signing keys cannot be had, since a 401 would send the user to sign in again.
 */
export function createAuthenticator(tenant: Tenant): (authorization: string | undefined) => Promise<Caller> {
  const keys = signingKeys(tenant);
  // A signature check is the dearest step of a call, and a client sends one token many times. The key is a
  // digest, so that no token lies in memory; refused tokens are not remembered, or they would fill the map.
  const remembered = new Map<string, { caller: Caller; until: number }>();

  return async function authenticate(authorization) {
    const token = bearerToken(authorization);
    const digest = hash("sha256", token, "base64");
    const known = remembered.get(digest);
    if (known !== undefined) {
      if (Date.now() < known.until) return known.caller;
      remembered.delete(digest);
    }
    const { caller, expiresAt } = await verifyToken(token, tenant, keys);
    const [oldest] = remembered.keys();
    if (remembered.size >= REMEMBER_AT_MOST && oldest !== undefined) remembered.delete(oldest);
    remembered.set(digest, { caller, until: Math.min(Date.now() + REMEMBER_MS, expiresAt * 1000) });
    return caller;
  };
}

/** The token from the header, and from nowhere else: never from the query string (RFC 9700 §4.3.2). */
function bearerToken(authorization: string | undefined): string {
  const [, token = ""] = /^bearer +(.+)$/i.exec(authorization ?? "") ?? [];
  if (token === "") {
    const found = authorization === undefined
      ? "Authorization is missing"
      : "Authorization is not 'Bearer <token>'";
    throw new AuthError(401, undefined, `Sign in first: ${found}. The resource_metadata URL says where`);
  }
  return token;
}

/**
 * Checks an access token of either of Auth0's profiles (header `typ` JWT or at+jwt).
 *
 * RS256 alone: a token that chose its own algorithm would choose how it is checked (RFC 8725 §3.1). The keys
 * are the tenant's, whatever `jku`, `x5u` or `jwk` the token carries (§3.10). The audience is our own URL, so
 * that a token for another API opens nothing here (§3.9, RFC 8707 §2).
 *
 * @returns The caller, and `exp` in seconds since 1970.
 * @throws {AuthError} See `createAuthenticator`.
 */
async function verifyToken(token: string, tenant: Tenant, keys: JWTVerifyGetKey) {
  const parts = token.split(".").length;
  if (parts === 5) {
    throw invalid(
      "Token is encrypted (a JWE of 5 parts), which no API can read: Auth0 did not know for which API " +
        "it was. Set the Default Audience, README Step 2",
    );
  }
  if (parts !== 3) {
    throw invalid(
      "Token is opaque, not a JWT: Auth0 issued it for no API. Set the Default Audience, README Step 2",
    );
  }
  try {
    // The commonest refusal by far is a token that has run out: it need not cost a signature check.
    const { exp } = decodeJwt(token);
    if (typeof exp === "number" && exp + CLOCK_TOLERANCE_SECONDS <= Date.now() / 1000) throw invalid(EXPIRED);
    const { payload, protectedHeader } = await jwtVerify(token, keys, {
      algorithms: ["RS256"],
      issuer: tenant.issuer,
      audience: tenant.audience,
      requiredClaims: ["exp", "sub"],
      clockTolerance: CLOCK_TOLERANCE_SECONDS,
    });
    // Other kinds of JWT come from the same keys: logout tokens, DPoP proofs (RFC 8725 §3.11, RFC 9068 §4).
    const type = protectedHeader.typ?.toLowerCase().replace(/^application\//, "") ?? "jwt";
    if (type !== "jwt" && type !== "at+jwt") {
      throw invalid("Token is of another type: expected typ JWT or at+jwt");
    }
    if (typeof payload.sub !== "string" || payload.sub === "") {
      throw invalid("Token has no subject: the sub claim must be a non-empty string");
    }
    return { caller: toCaller(payload.sub, payload), expiresAt: payload.exp ?? 0 };
  } catch (error) {
    throw error instanceof AuthError ? error : explain(error, tenant);
  }
}

function toCaller(subject: string, payload: JWTPayload): Caller {
  const { iss, aud, azp, client_id, scope, permissions, exp } = payload;
  const granted = [
    ...(typeof scope === "string" ? scope.split(" ") : []),
    ...(Array.isArray(permissions) ? permissions : []),
  ];
  const profile: Caller["profile"] = {};
  for (const name of ["name", "email", "nickname"] as const) {
    // Auth0 puts an Action's custom claims under a namespace: `https://…/email`.
    const claim = Object.entries(payload).find(([key]) =>
      key === name || /^https?:/.test(key) && key.endsWith(`/${name}`)
    );
    if (typeof claim?.[1] === "string") profile[name] = claim[1];
  }
  const scopes = new Set(
    granted.filter((value): value is string => typeof value === "string" && value !== ""),
  );
  return { subject, scopes, profile, claims: { iss, aud, azp, client_id, scope, permissions, exp } };
}

/** Without a cause: jose's and JSON's own messages can quote the token, and causes go into the log. */
function invalid(message: string): AuthError {
  return new AuthError(401, "invalid_token", message);
}

/** Says what each of jose's errors means here. What is not the token's fault is a 503. */
function explain(error: unknown, tenant: Tenant): AuthError {
  if (error instanceof errors.JWTExpired) return invalid(EXPIRED);
  if (error instanceof errors.JWTClaimValidationFailed) return invalid(explainClaim(error, tenant));
  if (error instanceof errors.JOSEAlgNotAllowed) {
    return invalid(
      "Token is not signed with RS256: choose RS256 as Signing Algorithm of the API, README Step 1",
    );
  }
  if (error instanceof errors.JWKSNoMatchingKey || error instanceof errors.JWKSMultipleMatchingKeys) {
    return invalid(
      `Token is signed with a key that ${tenant.issuer} does not publish: it comes from another tenant, ` +
        "or from before a key was revoked. Compare AUTH0_DOMAIN, README Step 0",
    );
  }
  if (error instanceof errors.JWSSignatureVerificationFailed) {
    return invalid("Token's signature does not fit its content: it was altered on the way, or forged");
  }
  if (
    error instanceof errors.JWSInvalid || error instanceof errors.JWTInvalid ||
    error instanceof errors.JOSENotSupported
  ) {
    return invalid(
      "Token is malformed: it has three parts as a JWT does, but they cannot be read as one",
    );
  }
  return new AuthError(
    503,
    undefined,
    `Auth0's signing keys cannot be had from ${keySetUrl(tenant)}: try again`,
    error,
  );
}

/** jose checks claims after the signature, so what is quoted here was written by the tenant. */
function explainClaim(
  { claim, payload: { iss, aud, scope } }: errors.JWTClaimValidationFailed,
  tenant: Tenant,
): string {
  const userinfo = `${tenant.issuer}userinfo`;
  switch (claim) {
    case "iss":
      return `Token has the issuer ${iss}, expected ${tenant.issuer}` +
        (`${iss}/` === tenant.issuer
          ? ": the trailing slash is missing"
          : ": compare AUTH0_DOMAIN, README Step 0");
    case "aud": {
      const expected = `Token has the audience ${aud ?? "(none)"}, expected ${tenant.audience}`;
      if (String(aud) === userinfo) {
        return `${expected}: it is for Auth0's own userinfo. Set the Default Audience, README Step 2`;
      }
      if (typeof aud === "string" && scope === undefined && !aud.includes(":")) {
        return `${expected}: this looks like an ID token. Send the access token`;
      }
      return `${expected}: the API Identifier must equal MCP_SERVER_URL, to the last slash, README Step 1 and Step 0`;
    }
    case "nbf":
      return "Token is not valid yet: its nbf claim lies ahead. Compare the server's clock";
    default:
      return `Token lacks a usable ${claim} claim`;
  }
}

const keySetUrl = (tenant: Tenant): string => `${tenant.issuer}.well-known/jwks.json`;

/** A withdrawn key is accepted for at most this and `REMEMBER_MS` together while Auth0 can be reached. */
const KEYS_FRESH_MS = 5 * 60_000;
/** How much longer known keys serve while Auth0 cannot be reached: its outage should not be ours. */
const KEYS_GRACE_MS = 60 * 60_000;
const KEY_SET_MAX_BYTES = 64 * 1024;

/**
 * The tenant's signing keys: jose's remote key set, with a longer memory for outages.
 *
 * jose asks again for an unknown `kid`, but not sooner than its cooldown, so that made-up ones cause no flood.
 */
function signingKeys(tenant: Tenant): JWTVerifyGetKey {
  let loadedAt = 0;
  let failure = { at: 0, error: undefined as unknown };
  let warnedAt = 0;

  const fetchKeySet: FetchImplementation = async (url, options) => {
    // jose's cooldown counts from the last success only: in an outage made-up kids would ask Auth0 without pause.
    if (loadedAt > 0 && Date.now() - failure.at < 1_000) throw failure.error;
    try {
      const keySet = await readKeySet(await fetch(url, options));
      loadedAt = Date.now();
      return Response.json(keySet);
    } catch (error) {
      failure = { at: Date.now(), error };
      throw error;
    }
  };
  const remote = createRemoteJWKSet(new URL(keySetUrl(tenant)), {
    timeoutDuration: 3_000,
    cooldownDuration: 5_000,
    cacheMaxAge: Infinity, // their age is judged below
    [customFetch]: fetchKeySet,
  });

  async function refresh() {
    const isKnownOutage = Date.now() - failure.at < 60_000;
    const attempt = remote.reload().catch((error: unknown) => {
      if (Date.now() - warnedAt < 60_000) return;
      warnedAt = Date.now();
      const minutes = Math.round((warnedAt - loadedAt) / 60_000);
      tenant.warn(
        `${keySetUrl(tenant)} cannot be had (${reason(error)}): going on with keys ${minutes} minutes old`,
      );
    });
    if (!isKnownOutage) await attempt; // in a known one nobody is kept waiting
  }

  return async (header, token) => {
    const age = Date.now() - loadedAt;
    if (age > KEYS_FRESH_MS && loadedAt > 0) {
      await (age > KEYS_FRESH_MS + KEYS_GRACE_MS ? remote.reload() : refresh());
    }
    return remote(header, token);
  };
}

/** Takes a key set only if it is one: an outage may answer 200 with HTML, with nothing, or without end. */
async function readKeySet(response: Response): Promise<{ keys: unknown[] }> {
  if (response.status !== 200) throw new Error(`HTTP status ${response.status}`);
  const chunks: Uint8Array[] = [];
  let size = 0;
  for await (const chunk of response.body ?? []) {
    size += chunk.length;
    if (size > KEY_SET_MAX_BYTES) throw new Error(`more than ${KEY_SET_MAX_BYTES} bytes`);
    chunks.push(chunk);
  }
  const { keys } = JSON.parse(Buffer.concat(chunks).toString());
  if (!Array.isArray(keys) || keys.length === 0) throw new Error("no keys in it");
  return { keys };
}

/** What went wrong, for the log: fetch hides the cause of a network failure one level down. */
export function reason(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const cause = error.cause instanceof Error ? `: ${reason(error.cause)}` : "";
  return `${error.message || error.name}${cause}`.replace(/\s+/g, " ");
}
