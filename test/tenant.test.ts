/** What the stand-in must do as Auth0 does, and no other test notices. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test, type TestContext } from "node:test";
import { decodeJwt, decodeProtectedHeader, importJWK, type JWK, SignJWT } from "jose";
import { publishClientMetadata } from "./support/chatgpt.ts";
import { ALICE, configuredTenant, OIDC_SCOPES, signIn, startTenant, TENANT_KINDS } from "./support/tenant.ts";
import type { Tenant, TenantKind, Way } from "./support/tenant.ts";

const API = "http://localhost:1/mcp";
const CALLBACK = "https://chatgpt.com/connector/oauth/test";
const VERIFIER = "a".repeat(43);

async function start(t: TestContext, kind: TenantKind = "permissive", way: Way = "register"): Promise<Tenant> {
  const tenant = await startTenant(configuredTenant(kind, API, way));
  t.after(() => tenant.close());
  return tenant;
}

/** What authenticates a client by its own key (RFC 7523 §2.2). A claim that is undefined is left out. */
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

/** A client that registers itself. */
async function register(tenant: Tenant, redirect_uris = [CALLBACK]): Promise<string> {
  const body = JSON.stringify({ redirect_uris, token_endpoint_auth_method: "none" });
  const response = await fetch(`${tenant.origin}/oidc/register`, { method: "POST", body });
  return (await response.json()).client_id;
}

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

async function exchange(tenant: Tenant, parameters: Record<string, string>): Promise<Record<string, string>> {
  const body = new URLSearchParams(parameters);
  return await (await fetch(`${tenant.origin}/oauth/token`, { method: "POST", body })).json();
}

/** Registers a client and signs Alice in with it. */
async function link(tenant: Tenant, parameters: Record<string, string> = {}) {
  const clientId = await register(tenant);
  const callback = await signIn(authorizeUrl(tenant, clientId, parameters), ALICE);
  const exchanged = {
    grant_type: "authorization_code",
    client_id: clientId,
    code: callback.searchParams.get("code") ?? "",
    redirect_uri: CALLBACK,
    code_verifier: VERIFIER,
  };
  const tokens = await exchange(tenant, exchanged);
  return { clientId, exchanged, tokens, claims: decodeJwt(tokens.access_token ?? "") };
}

test("all fourteen scopes that Auth0 advertises are granted with the Action, six of them without", async (t) => {
  const tenant = await start(t);
  assert.equal(OIDC_SCOPES.length, 14);
  assert.deepEqual((await link(tenant)).tokens.scope?.split(" ").toSorted(), OIDC_SCOPES.toSorted());
  tenant.settings.postLoginAction = false;
  assert.equal((await link(tenant)).tokens.scope, "openid profile offline_access email phone address");
});

test("the tenant takes audience before resource, which counts under the Compatibility Profile only", async (t) => {
  const tenant = await start(t);
  const { settings } = tenant;
  Object.assign(settings, { resourceParameterCompatibilityProfile: true, defaultAudience: "https://other.example" });
  const request = { resource: API, scope: "offline_access" };
  assert.equal((await link(tenant, request)).claims.aud, API);
  await assert.rejects(link(tenant, { ...request, audience: "https://third.example" }), {
    message: "Oops!, something went wrong access_denied: Service not found: https://third.example",
  });
  Object.assign(settings, { resourceParameterCompatibilityProfile: false, defaultAudience: API });
  assert.equal((await link(tenant, { ...request, resource: "https://other.example" })).claims.aud, API);
});

test("a strict client must use PKCE and known parameters, a permissive one need not", async (t) => {
  for (const kind of TENANT_KINDS) {
    const tenant = await start(t, kind);
    const clientId = await register(tenant);
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
  const tenant = await start(t);
  const clientId = await register(tenant, [CALLBACK, "http://127.0.0.1:1000/callback"]);
  const redirectTo = (redirect_uri: string) => signIn(authorizeUrl(tenant, clientId, { redirect_uri }), ALICE);
  await assert.rejects(redirectTo(`${CALLBACK}/`), /Callback URL mismatch/);
  assert.match((await redirectTo("http://127.0.0.1:2000/callback")).href, /^http:\/\/127\.0\.0\.1:2000\/callback\?/);
});

test("an e-mail that the tenant does not know signs nobody in", async (t) => {
  const tenant = await start(t);
  const url = authorizeUrl(tenant, await register(tenant));
  await assert.rejects(signIn(url, { email: "eve@example.com" }), /Wrong email/);
});

test("an authorization code is good once, for its client, with its verifier", async (t) => {
  const tenant = await start(t);
  const { exchanged } = await link(tenant);
  assert.equal((await exchange(tenant, exchanged)).error, "invalid_grant");
  const others = [
    { code_verifier: "b".repeat(43) },
    { redirect_uri: "https://evil.example/" },
    { client_id: exchanged.client_id },
  ];
  for (const wrong of others) {
    const client_id = await register(tenant);
    const code = (await signIn(authorizeUrl(tenant, client_id), ALICE)).searchParams.get("code") ?? "";
    assert.equal((await exchange(tenant, { ...exchanged, client_id, code, ...wrong })).error, "invalid_grant");
  }
});

test("a refresh token is good for its client only, and a registered client gets no token without a user", async (t) => {
  const tenant = await start(t);
  const { clientId, tokens: { refresh_token = "" } } = await link(tenant);
  const refresh = (client_id: string) => exchange(tenant, { grant_type: "refresh_token", client_id, refresh_token });
  assert.equal((await refresh(await register(tenant))).error, "invalid_grant");
  assert.ok((await refresh(clientId)).access_token);
  const machine = { grant_type: "client_credentials", client_id: clientId, audience: API };
  assert.equal((await exchange(tenant, machine)).error, "unauthorized_client");
});

test("a client whose document says private_key_jwt is authenticated by its own assertion only", async (t) => {
  const tenant = await start(t, "strict", "cimd");
  const documents = await publishClientMetadata();
  t.after(documents.close);
  const others = await publishClientMetadata();
  t.after(others.close);
  const { url: documentUrl, privateKey } = documents;
  const clientId = documentUrl();
  await tenant.importFromUrl(clientId);
  const good = await assertion(tenant, clientId, privateKey);
  const assertions: Record<string, string>[] = [
    { client_id: clientId },
    { client_id: clientId, client_secret: "guess" },
    { ...good, client_assertion: "no.jwt.atall" },
    { ...good, client_assertion_type: "something-else" },
    await assertion(tenant, clientId, others.privateKey),
    await assertion(tenant, documentUrl("one"), privateKey),
    { client_id: clientId, ...await assertion(tenant, documentUrl("one"), privateKey) },
    await assertion(tenant, clientId, privateKey, { iss: documentUrl("one") }),
    { client_id: clientId, ...await assertion(tenant, clientId, privateKey, { sub: documentUrl("one") }) },
    await assertion(tenant, clientId, privateKey, { aud: "https://other.example/" }),
    await assertion(tenant, clientId, privateKey, { exp: 1 }),
    await assertion(tenant, clientId, privateKey, { jti: undefined }),
  ];
  for (const wrong of assertions) {
    const { error } = await exchange(tenant, { grant_type: "refresh_token", ...wrong });
    assert.equal(error, "invalid_client", JSON.stringify(wrong));
  }
  const { error } = await exchange(tenant, { grant_type: "refresh_token", ...good });
  assert.equal(error, "invalid_grant"); // of the refresh token, which is missing
});

test("a browser's script can read metadata and keys, register and get tokens, but not sign in", async (t) => {
  const tenant = await start(t);
  const request = (path: string, init: RequestInit = {}) => fetch(`${tenant.origin}${path}`, init);
  const allowed = async (path: string, init?: RequestInit) =>
    (await request(path, init)).headers.get("access-control-allow-origin");
  for (const path of ["/.well-known/openid-configuration", "/.well-known/jwks.json"]) {
    assert.equal(await allowed(path), "*");
  }
  const asked = { "access-control-request-method": "POST", "access-control-request-headers": "authorization" };
  for (const path of ["/oidc/register", "/oauth/token"]) {
    const { status, headers } = await request(path, { method: "OPTIONS", headers: asked });
    assert.deepEqual([status, headers.get("access-control-allow-origin")], [204, "*"]);
    assert.equal(headers.get("access-control-allow-headers"), "authorization");
    assert.equal(await allowed(path, { method: "POST", body: new URLSearchParams() }), "*"); // errors, too
  }
  assert.equal(await allowed("/authorize"), null);
});

test("rotated keys stay in the set until they are withdrawn, and the newest one signs", async (t) => {
  const tenant = await start(t);
  const kids = async () => {
    const { keys } = await (await fetch(`${tenant.issuer}.well-known/jwks.json`)).json();
    return keys.map(({ kid }: { kid: string }) => kid);
  };
  const [first] = await kids();
  await tenant.rotateKeys();
  const [second, ...others] = await kids();
  assert.deepEqual(others, [first]);
  assert.equal(decodeProtectedHeader(await tenant.sign()).kid, second);
  await tenant.rotateKeys({ withdraw: true });
  assert.equal((await kids()).length, 1);
});
