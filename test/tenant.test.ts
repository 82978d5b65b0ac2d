/** Where the stand-in must be like Auth0 for the other tests to mean anything. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test, type TestContext } from "node:test";
import { createRemoteJWKSet, decodeJwt, decodeProtectedHeader, importJWK, jwtVerify, SignJWT } from "jose";
import type { JWK } from "jose";
import { type ClientDocuments, publishClientMetadata } from "./support/chatgpt.ts";
import { ALICE, configuredTenant, FIXED_CLIENT, OIDC_SCOPES, signIn, startTenant } from "./support/tenant.ts";
import type { Tenant, TenantKind, TenantSettings, Way } from "./support/tenant.ts";

const API = "http://localhost:1/mcp";
const CALLBACK = "https://chatgpt.com/connector/oauth/test";
const VERIFIER = "a".repeat(43);
const KINDS: TenantKind[] = ["permissive", "strict"];

interface Reply {
  status: number;
  body: Record<string, string>;
}

async function start(
  t: TestContext,
  kind: TenantKind,
  changes: Partial<TenantSettings> = {},
  way: Way = "register",
): Promise<Tenant> {
  const tenant = await startTenant({ ...configuredTenant(kind, API, way), ...changes });
  t.after(() => tenant.close());
  return tenant;
}

async function publishDocuments(t: TestContext): Promise<ClientDocuments> {
  const documents = await publishClientMetadata();
  t.after(documents.close);
  return documents;
}

/** How a client proves by its own key who it is (RFC 7523 §2.2). A claim that is `undefined` is left out. */
async function assertion(
  tenant: Tenant,
  clientId: string,
  privateKey: JWK,
  claims: Record<string, unknown> = {},
): Promise<Record<string, string>> {
  const exp = Math.floor(Date.now() / 1000) + 60;
  const payload = { iss: clientId, sub: clientId, aud: tenant.issuer, exp, jti: "once", ...claims };
  return {
    client_assertion_type: "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    client_assertion: await new SignJWT(payload).setProtectedHeader({ alg: "RS256" })
      .sign(await importJWK(privateKey, "RS256")),
  };
}

async function request(url: string, body?: URLSearchParams | object): Promise<Reply> {
  const response = await fetch(
    url,
    body && {
      method: "POST",
      ...(body instanceof URLSearchParams
        ? { body }
        : { body: JSON.stringify(body), headers: { "content-type": "application/json" } }),
    },
  );
  return { status: response.status, body: await response.json() };
}

const register = (tenant: Tenant) =>
  request(`${tenant.origin}/oidc/register`, {
    redirect_uris: [CALLBACK],
    token_endpoint_auth_method: "none",
  });

function authorizeUrl(tenant: Tenant, clientId: string, parameters: Record<string, string> = {}): URL {
  const url = new URL(`${tenant.origin}/authorize`);
  url.search = new URLSearchParams({
    response_type: "code",
    client_id: clientId,
    redirect_uri: CALLBACK,
    scope: OIDC_SCOPES.join(" "),
    code_challenge: createHash("sha256").update(VERIFIER).digest("base64url"),
    code_challenge_method: "S256",
    ...parameters,
  }).toString();
  return url;
}

const exchange = (tenant: Tenant, parameters: Record<string, string>) =>
  request(`${tenant.origin}/oauth/token`, new URLSearchParams(parameters));

const refresh = (tenant: Tenant, clientId: string, refreshToken = "") =>
  exchange(tenant, { grant_type: "refresh_token", client_id: clientId, refresh_token: refreshToken });

/** Registers a client and signs Alice in with it. */
async function link(tenant: Tenant, parameters: Record<string, string> = {}) {
  const { body: { client_id: clientId = "" } } = await register(tenant);
  const callback = await signIn(authorizeUrl(tenant, clientId, parameters), ALICE);
  const exchanged = {
    grant_type: "authorization_code",
    client_id: clientId,
    code: callback.searchParams.get("code") ?? "",
    redirect_uri: CALLBACK,
    code_verifier: VERIFIER,
  };
  const { status, body } = await exchange(tenant, exchanged);
  assert.equal(status, 200, JSON.stringify(body));
  return { clientId, callback, exchanged, tokens: body, accessToken: body.access_token ?? "" };
}

test("both discovery documents say what Auth0's say, registration listed though it is off", async (t) => {
  const tenant = await start(t, "permissive", { dynamicClientRegistration: false });
  const { body } = await request(`${tenant.issuer}.well-known/openid-configuration`);
  assert.deepEqual((await request(`${tenant.issuer}.well-known/oauth-authorization-server`)).body, body);
  assert.equal(body.issuer, `${tenant.origin}/`);
  assert.equal(body.jwks_uri, `${tenant.origin}/.well-known/jwks.json`);
  assert.equal(body.registration_endpoint, `${tenant.origin}/oidc/register`);
  assert.deepEqual(body.code_challenge_methods_supported, ["S256", "plain"]);
  assert.equal(body.scopes_supported?.length, 14);
  assert.equal(body.client_id_metadata_document_supported, undefined);
  assert.equal((await register(tenant)).status, 400);
});

test("registration ends at the tenant's application limit", async (t) => {
  const tenant = await start(t, "permissive", { applicationLimit: 2 });
  assert.equal((await register(tenant)).status, 201);
  assert.equal((await register(tenant)).body.error, "too_many_entities");
});

test("a strict tenant marks the clients that register themselves", async (t) => {
  const strict = await register(await start(t, "strict"));
  const permissive = await register(await start(t, "permissive"));
  assert.match(strict.body.client_id ?? "", /^tpc_/);
  assert.doesNotMatch(permissive.body.client_id ?? "", /^tpc_/);
  assert.deepEqual(strict.body.grant_types, ["authorization_code", "refresh_token"]);
});

test("a permissive tenant with the Action grants all OIDC scopes and issues an ID token", async (t) => {
  const tenant = await start(t, "permissive");
  const { tokens, accessToken, clientId } = await link(tenant);
  assert.deepEqual(tokens.scope?.split(" ").toSorted(), OIDC_SCOPES.toSorted());
  const { payload, protectedHeader } = await jwtVerify(
    accessToken,
    createRemoteJWKSet(new URL(`${tenant.issuer}.well-known/jwks.json`)),
    { issuer: tenant.issuer, audience: API, algorithms: ["RS256"] },
  );
  assert.equal(protectedHeader.typ, "JWT");
  assert.deepEqual(payload.aud, [API, `${tenant.issuer}userinfo`]);
  assert.equal(payload.sub, ALICE.sub);
  assert.equal(payload.azp, clientId);
  assert.equal(payload.email, undefined);
  assert.equal(decodeJwt(tokens.id_token ?? "").aud, clientId);
});

test("without the Action Auth0 grants fewer scopes than it advertises", async (t) => {
  const tenant = await start(t, "permissive", { postLoginAction: false });
  const { tokens } = await link(tenant);
  assert.equal(tokens.scope, "openid profile offline_access email phone address");
});

test("a strict tenant grants default permissions and offline_access, no OIDC scope and no ID token", async (t) => {
  const tenant = await start(t, "strict");
  const { tokens, accessToken } = await link(tenant, {
    scope: "openid email offline_access tasks:read admin",
  });
  assert.equal(tokens.scope, "offline_access tasks:read");
  assert.equal(tokens.id_token, undefined);
  assert.equal(decodeJwt(accessToken).aud, API);
});

test("the RFC 9068 profile has its own header and names the client differently", async (t) => {
  const tenant = await start(t, "permissive");
  for (const api of tenant.settings.apis) api.accessTokenProfile = "rfc9068";
  const { accessToken, clientId } = await link(tenant);
  const { azp, client_id, jti } = decodeJwt(accessToken);
  assert.equal(decodeProtectedHeader(accessToken).typ, "at+jwt");
  assert.deepEqual([azp, client_id, typeof jti], [undefined, clientId, "string"]);
});

test("with RBAC the token holds the user's permissions, in their own claim and as far as asked in scope", async (t) => {
  const tenant = await start(t, "permissive", { users: [{ ...ALICE, permissions: ["tasks:read"] }] });
  for (const api of tenant.settings.apis) api.enableRbac = true;
  const { accessToken, tokens } = await link(tenant, { scope: "tasks:read tasks:write" });
  assert.deepEqual(decodeJwt(accessToken).permissions, ["tasks:read"]);
  assert.equal(tokens.scope, "tasks:read");
});

test("without an audience the token is an encrypted JWE, or opaque", async (t) => {
  const tenant = await start(t, "permissive", { defaultAudience: "" });
  const { accessToken } = await link(tenant, { resource: API });
  assert.equal(accessToken.split(".").length, 5);
  assert.equal(decodeProtectedHeader(accessToken).alg, "dir");
  tenant.settings.userinfoToken = "opaque";
  assert.doesNotMatch((await link(tenant)).accessToken, /\./);
});

test("resource names the API under the compatibility profile only, and audience alone wins over it", async (t) => {
  const tenant = await start(t, "permissive", {
    resourceParameterCompatibilityProfile: true,
    defaultAudience: "",
  });
  const { accessToken } = await link(tenant, { resource: API, scope: "offline_access" });
  assert.equal(decodeJwt(accessToken).aud, API);
  await assert.rejects(link(tenant, { resource: API, audience: "https://other.example" }), {
    message: "Oops!, something went wrong access_denied: Service not found: https://other.example",
  });
  tenant.settings.defaultAudience = "https://other.example";
  assert.equal(decodeJwt((await link(tenant, { resource: API, scope: "offline_access" })).accessToken).aud, API);
  tenant.settings.resourceParameterCompatibilityProfile = false;
  tenant.settings.defaultAudience = API;
  assert.ok(await link(tenant, { resource: "https://other.example" }));
});

test("errors of a third-party client are shown on a page and logged, and never sent to its callback", async (t) => {
  const tenant = await start(t, "permissive");
  const { body: { client_id: clientId = "" } } = await register(tenant);
  for (const connection of tenant.settings.connections) connection.domainLevel = false;
  const response = await fetch(authorizeUrl(tenant, clientId), { redirect: "manual" });
  assert.equal(response.status, 400);
  assert.match(await response.text(), /Oops!, something went wrong.*no connections enabled for the client/s);
  assert.deepEqual(tenant.logs.at(-1), { type: "f", description: "no connections enabled for the client" });
});

test("a strict client without a grant for the API is not authorized, a permissive one is", async (t) => {
  for (const kind of KINDS) {
    const tenant = await start(t, kind);
    for (const api of tenant.settings.apis) delete api.defaultPermissionsForThirdPartyApplications;
    if (kind === "permissive") await link(tenant);
    else {await assert.rejects(
        link(tenant),
        /Client "tpc_.*" is not authorized to access resource server "http/,
      );}
  }
});

test("a strict client must use PKCE and known parameters, a permissive one need not", async (t) => {
  for (const kind of KINDS) {
    const tenant = await start(t, kind);
    const { body: { client_id: clientId = "" } } = await register(tenant);
    const unknown = authorizeUrl(tenant, clientId, { made_up: "1" });
    const plain = authorizeUrl(tenant, clientId);
    plain.searchParams.delete("code_challenge");
    for (const url of [unknown, plain]) {
      if (kind === "permissive") assert.ok(await signIn(url, ALICE));
      else await assert.rejects(signIn(url, ALICE), /invalid_request/);
    }
  }
});

test("only a registered callback is redirected to, on loopback with any port", async (t) => {
  const tenant = await start(t, "permissive");
  const { body: { client_id: clientId = "" } } = await request(`${tenant.origin}/oidc/register`, {
    redirect_uris: [CALLBACK, "http://127.0.0.1:1000/callback"],
  });
  await assert.rejects(
    signIn(authorizeUrl(tenant, clientId, { redirect_uri: `${CALLBACK}/` }), ALICE),
    /Callback URL mismatch/,
  );
  const redirect_uri = "http://127.0.0.1:2000/callback";
  const state = "s".repeat(500);
  const callback = await signIn(authorizeUrl(tenant, clientId, { redirect_uri, state }), ALICE);
  assert.ok(callback.href.startsWith(redirect_uri));
  assert.equal(callback.searchParams.get("state"), state);
});

test("the sign-in page knows its users, and who declines is sent back with access_denied", async (t) => {
  const tenant = await start(t, "permissive");
  const { body: { client_id: clientId = "" } } = await register(tenant);
  await assert.rejects(signIn(authorizeUrl(tenant, clientId), { email: "eve@example.com" }), /Wrong email/);
  const callback = await signIn(authorizeUrl(tenant, clientId), ALICE, "decline");
  assert.equal(callback.searchParams.get("error"), "access_denied");
  assert.equal(callback.searchParams.get("code"), null);
});

test("a code is for one use, for its client and for the holder of the verifier", async (t) => {
  const tenant = await start(t, "permissive");
  const { exchanged } = await link(tenant);
  const again = await exchange(tenant, exchanged);
  assert.deepEqual([again.status, again.body.error], [403, "invalid_grant"]);
  const others = [
    { code_verifier: "b".repeat(43) },
    { redirect_uri: "https://evil.example/" },
    { client_id: exchanged.client_id },
  ];
  for (const wrong of others) {
    const { body: { client_id: clientId = "" } } = await register(tenant);
    const callback = await signIn(authorizeUrl(tenant, clientId), ALICE);
    const code = callback.searchParams.get("code") ?? "";
    const reply = await exchange(tenant, { ...exchanged, client_id: clientId, code, ...wrong });
    assert.equal(reply.body.error, "invalid_grant");
  }
});

test("refresh tokens are their client's, rotate, and the reuse of one ends them all", async (t) => {
  const tenant = await start(t, "strict");
  const { clientId, tokens } = await link(tenant);
  const { body: { client_id: otherId = "" } } = await register(tenant);
  assert.equal((await refresh(tenant, otherId, tokens.refresh_token)).body.error, "invalid_grant");
  const second = await refresh(tenant, clientId, tokens.refresh_token);
  assert.equal(second.status, 200);
  assert.equal(second.body.scope, tokens.scope);
  assert.equal((await refresh(tenant, clientId, tokens.refresh_token)).body.error, "invalid_grant");
  assert.equal((await refresh(tenant, clientId, second.body.refresh_token)).body.error, "invalid_grant");
});

test("there is no refresh token without offline_access in the request and on the API", async (t) => {
  const tenant = await start(t, "permissive");
  assert.equal((await link(tenant, { scope: "openid" })).tokens.refresh_token, undefined);
  for (const api of tenant.settings.apis) api.allowOfflineAccess = false;
  assert.equal((await link(tenant)).tokens.refresh_token, undefined);
});

test("a machine-to-machine application gets a token of its own, with its secret and for its APIs only", async (t) => {
  const tenant = await start(t, "permissive");
  const credentials = {
    grant_type: "client_credentials",
    client_id: "machine",
    client_secret: "machine-secret",
    audience: API,
  };
  const { body } = await request(`${tenant.origin}/oauth/token`, credentials);
  assert.equal(decodeJwt(body.access_token ?? "").sub, "machine@clients");
  assert.equal((await exchange(tenant, { ...credentials, client_secret: "guess" })).status, 401);
  const [api] = configuredTenant("permissive", "https://other.example").apis;
  assert.ok(api);
  tenant.settings.apis.push(api);
  assert.equal((await exchange(tenant, { ...credentials, audience: api.identifier })).body.error, "access_denied");
  const { body: { client_id: clientId = "" } } = await register(tenant);
  const refused = await exchange(tenant, {
    grant_type: "client_credentials",
    client_id: clientId,
    audience: API,
  });
  assert.equal(refused.body.error, "unauthorized_client");
});

test("a client metadata document works once its URL is imported, and is strict on any tenant", async (t) => {
  const tenant = await start(t, "permissive", {}, "cimd");
  const { url: documentUrl, privateKey } = await publishDocuments(t);
  const { body } = await request(`${tenant.issuer}.well-known/openid-configuration`);
  assert.equal(body.client_id_metadata_document_supported, true);
  for (const clientId of [documentUrl(), documentUrl("one")]) {
    const { redirect_uris: [redirect_uri = ""] } = await (await fetch(clientId)).json() as {
      redirect_uris: string[];
    };
    const url = authorizeUrl(tenant, clientId, { redirect_uri });
    await assert.rejects(signIn(url, ALICE), {
      message: `Oops!, something went wrong invalid_request: Unknown client: ${clientId}`,
    });
    await tenant.importFromUrl(clientId);
    const code = (await signIn(url, ALICE)).searchParams.get("code") ?? "";
    const { body: tokens } = await exchange(tenant, {
      grant_type: "authorization_code",
      ...await assertion(tenant, clientId, privateKey),
      code,
      redirect_uri,
      code_verifier: VERIFIER,
    });
    assert.equal(tokens.scope, "offline_access");
    assert.match(String(decodeJwt(tokens.access_token ?? "").azp), /^tpc_/);
  }
});

test("a client whose document says private_key_jwt is believed with its own assertion only", async (t) => {
  const tenant = await start(t, "strict", {}, "cimd");
  const { url: documentUrl, privateKey } = await publishDocuments(t);
  const clientId = documentUrl();
  await tenant.importFromUrl(clientId);
  const { privateKey: otherKey } = await publishDocuments(t);
  const good = await assertion(tenant, clientId, privateKey);
  const assertions: Record<string, string>[] = [
    { client_id: clientId },
    { client_id: clientId, client_secret: "guess" },
    { ...good, client_assertion: "no.jwt.atall" },
    { ...good, client_assertion_type: "something-else" },
    await assertion(tenant, clientId, otherKey),
    await assertion(tenant, documentUrl("one"), privateKey),
    { client_id: clientId, ...await assertion(tenant, documentUrl("one"), privateKey) },
    await assertion(tenant, clientId, privateKey, { iss: documentUrl("one") }),
    await assertion(tenant, clientId, privateKey, { aud: "https://other.example/" }),
    await assertion(tenant, clientId, privateKey, { exp: 1 }),
    await assertion(tenant, clientId, privateKey, { jti: undefined }),
  ];
  for (const wrong of assertions) {
    const { status, body } = await exchange(tenant, { grant_type: "refresh_token", ...wrong });
    assert.deepEqual([status, body.error], [401, "invalid_client"], JSON.stringify(wrong));
  }
  const { body } = await exchange(tenant, { grant_type: "refresh_token", ...good });
  assert.equal(body.error, "invalid_grant"); // the client is believed, the missing refresh token is not
});

test("iss comes with every answer to the callback while it is included, and the metadata says so", async (t) => {
  const tenant = await start(t, "permissive", {}, "fixed");
  const redirect_uri = "https://chatgpt.com/connector_platform_oauth_redirect";
  const answers = async () => {
    tenant.settings.defaultAudience = API;
    const url = authorizeUrl(tenant, FIXED_CLIENT.client_id, { redirect_uri });
    const accepted = await signIn(url, ALICE);
    const declined = await signIn(url, ALICE, "decline");
    tenant.settings.defaultAudience = "https://other.example";
    const failed = await signIn(url, ALICE); // a first-party application is told what has failed
    const outcomes = [accepted, declined, failed].map(({ searchParams }) =>
      searchParams.get("error_description") ?? typeof searchParams.get("code")
    );
    assert.deepEqual(outcomes, [
      "string",
      "User did not authorize the request",
      "Service not found: https://other.example",
    ]);
    return [accepted, declined, failed].map(({ searchParams }) => searchParams.get("iss"));
  };
  const advertised = async () =>
    (await request(`${tenant.issuer}.well-known/oauth-authorization-server`)).body
      .authorization_response_iss_parameter_supported;
  assert.deepEqual([await advertised(), ...await answers()], [undefined, null, null, null]);
  tenant.settings.includeIssuerInAuthorizationResponses = true;
  const { issuer } = tenant;
  assert.deepEqual([await advertised(), ...await answers()], [true, issuer, issuer, issuer]);
});

test("within the overlap period a refresh token may be used again, after it its reuse ends them all", async (t) => {
  const tenant = await start(t, "strict");
  const { clientId, tokens: { refresh_token: first } } = await link(tenant);
  const application = tenant.settings.applications.find((one) => one.clientId === clientId);
  assert.ok(application);
  application.rotationOverlap = 30;
  const replies = await Promise.all([refresh(tenant, clientId, first), refresh(tenant, clientId, first)]);
  assert.deepEqual(replies.map(({ status }) => status), [200, 200]);
  t.mock.timers.enable({ apis: ["Date"], now: Date.now() + 31_000 });
  assert.equal((await refresh(tenant, clientId, first)).body.error, "invalid_grant");
  for (const { body } of replies) {
    assert.equal((await refresh(tenant, clientId, body.refresh_token)).body.error, "invalid_grant");
  }
});

test("an application made by hand signs in at its own connections and callbacks, with its secret", async (t) => {
  const tenant = await start(t, "strict", {}, "fixed");
  const redirect_uri = "https://chatgpt.com/connector/oauth/fixed";
  const signInAs = (parameters: Record<string, string>) =>
    signIn(authorizeUrl(tenant, FIXED_CLIENT.client_id, { redirect_uri, ...parameters }), ALICE);
  const code = (await signInAs({})).searchParams.get("code") ?? "";
  const exchanged = {
    grant_type: "authorization_code",
    ...FIXED_CLIENT,
    code,
    redirect_uri,
    code_verifier: VERIFIER,
  };
  assert.equal((await exchange(tenant, { ...exchanged, client_secret: "guess" })).body.error, "invalid_client");
  assert.ok((await exchange(tenant, exchanged)).body.id_token);
  await assert.rejects(signInAs({ redirect_uri: `${redirect_uri}/other` }), /Callback URL mismatch: https/);
  for (const application of tenant.settings.applications) application.connections = ["google-oauth2"];
  const refused = (await signInAs({})).searchParams.get("error_description");
  assert.equal(refused, "no connections enabled for the client");
});

test("a browser's script may read metadata and keys, register and ask for tokens, but not the sign-in page", async (t) => {
  const tenant = await start(t, "permissive");
  const allowed = async (path: string, init: RequestInit = {}) => {
    const { headers } = await fetch(`${tenant.origin}${path}`, init);
    return headers.get("access-control-allow-origin");
  };
  const preflight = (path: string) =>
    fetch(`${tenant.origin}${path}`, {
      method: "OPTIONS",
      headers: {
        origin: "http://localhost:6274",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
      },
    });
  for (const path of ["/.well-known/openid-configuration", "/.well-known/jwks.json"]) {
    assert.equal(await allowed(path), "*");
  }
  for (const path of ["/oidc/register", "/oauth/token"]) {
    const { status, headers } = await preflight(path);
    assert.equal(status, 204);
    assert.equal(headers.get("access-control-allow-origin"), "*");
    assert.equal(headers.get("access-control-allow-headers"), "authorization,content-type");
    assert.equal(await allowed(path, { method: "POST", body: new URLSearchParams() }), "*"); // errors, too
  }
  assert.equal(await allowed("/authorize"), null);
});

test("rotated keys stay in the set until they are withdrawn", async (t) => {
  const tenant = await start(t, "permissive");
  const kids = async () => {
    const { body } = await request(`${tenant.issuer}.well-known/jwks.json`);
    return (body.keys as unknown as { kid: string }[]).map(({ kid }) => kid);
  };
  const [first] = await kids();
  await tenant.rotateKeys();
  const [second, ...others] = await kids();
  assert.deepEqual(others, [first]);
  assert.equal(decodeProtectedHeader(await tenant.sign()).kid, second);
  await tenant.rotateKeys({ withdraw: true });
  assert.equal((await kids()).length, 1);
  assert.equal(tenant.jwksRequests, 3);
});
