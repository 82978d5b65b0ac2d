/** `npm run doctor` on the way through the tenant's sign-in: as which client, with which answers. */
import assert from "node:assert/strict";
import { test } from "node:test";
import type { TestContext } from "node:test";
import { publishClientMetadata } from "./support/chatgpt.ts";
import type { Options } from "./run/doctor.ts";
import { assertMissing, runDoctor, sendPage, start, startWithTenantThat, statusOf } from "./support/doctor.ts";
import type { Intercept, Report } from "./support/doctor.ts";
import { configuredTenant, FIXED_CLIENT } from "./support/tenant-settings.ts";

const OOPS = "<!doctype html><title>Error</title><h1>Oops!, something went wrong</h1><p>Tracking ID 42</p>";

async function runWith(t: TestContext, options: Options, intercept: Intercept): Promise<Report> {
  const { env } = await startWithTenantThat(t, { intercept });
  return await runDoctor(env, options);
}

test("a refused code and an encrypted machine-to-machine token point to Step 1", async (t) => {
  const report = await runWith(t, { login: true }, ({ url }, response, body) => {
    if (url !== "/oauth/token") return false;
    response.setHeader("content-type", "application/json");
    if (body.includes("client_credentials")) {
      response.end(JSON.stringify({ access_token: "a.b.c.d.e", token_type: "Bearer" }));
    } else {
      response.writeHead(403).end(JSON.stringify({ error: "unauthorized_client" }));
    }
    return true;
  });
  assertMissing(
    report,
    [1, /kind of token: found an encrypted one.*JSON Web Encryption.*README, "API Settings"/],
    [1, /token: 403 unauthorized_client Set the Default Permissions.*README, "API Settings"/],
  );
});

test("a refresh token that does not work is missing", async (t) => {
  const report = await runWith(t, { login: true }, ({ url }, response, body) => {
    if (url !== "/oauth/token" || !body.includes("grant_type=refresh_token")) return false;
    response.writeHead(403).end(JSON.stringify({ error: "invalid_grant", error_description: "Unknown" }));
    return true;
  });
  assertMissing(report, [1, /refresh token: 403 invalid_grant: Unknown/]);
});

test("an error page that hides its cause is neither ok nor blamed on a step", async (t) => {
  const report = await runWith(t, { register: true }, ({ url = "" }, response) => {
    return url.startsWith("/authorize") && sendPage(response, 400, OOPS);
  });
  assertMissing(report);
  assert.equal(statusOf(report, /sign-in page: 400 Error Oops!.*Monitoring → Logs/), "cannot tell");
});

test("an error page of the tenant's own is read from its address", async (t) => {
  const said = "no connections enabled for the client";
  const report = await runWith(t, { register: true }, ({ url = "" }, response) => {
    if (!url.startsWith("/authorize")) return false;
    const query = new URLSearchParams({ error: "invalid_request", error_description: said });
    response.writeHead(302, { location: `https://example.com/oops?${query}` }).end();
    return true;
  });
  assertMissing(report, [3, /sign-in page: invalid_request: no connections enabled for the client/]);
});

test("a sign-in page behind a redirect and a cookie is found", async (t) => {
  const report = await runWith(t, { register: true }, ({ url = "", headers }, response) => {
    if (url.startsWith("/authorize")) {
      response.writeHead(302, { "location": "/u/login?state=1", "set-cookie": "did=1; Path=/; HttpOnly" })
        .end();
      return true;
    }
    if (!url.startsWith("/u/login")) return false;
    return headers.cookie === "did=1" ? sendPage(response, 200, "<h1>Log in</h1>") : sendPage(response, 400, OOPS);
  });
  assertMissing(report);
  assert.equal(statusOf(report, /sign-in page: opens/), "ok");
});

test("the tenant's issuer identification decides which callback and document of ChatGPT's are named", async (t) => {
  const { tenant, env } = await start(t);
  tenant.settings.clientIdMetadataDocumentRegistration = true;
  const off = await runDoctor(env);
  assertMissing(off);
  assert.match(
    off.output,
    /issuer identification: off: .* https:\/\/chatgpt\.com\/connector\/oauth\/\{callback_id\}/,
  );
  assert.match(
    off.output,
    /CIMD: advertised: .* https:\/\/chatgpt\.com\/oauth\/\{callback_id\}\/client\.json/,
  );

  tenant.settings.includeIssuerInAuthorizationResponses = true;
  const on = await runDoctor(env, { login: true });
  assertMissing(on);
  assert.match(
    on.output,
    /issuer identification: on: .* https:\/\/chatgpt\.com\/connector_platform_oauth_redirect/,
  );
  assert.match(on.output, /CIMD: advertised: .* https:\/\/chatgpt\.com\/oauth\/client\.json/);
  assert.equal(statusOf(on, /issuer of the answer: http/), "ok");
});

test("an issuer that is advertised and not sent is missing", async (t) => {
  const { tenant, env } = await start(t);
  tenant.settings.includeIssuerInAuthorizationResponses = true;
  tenant.withholdsIssuer = true;
  assertMissing(await runDoctor(env, { login: true }), [
    2,
    /issuer of the answer: found none, expected http.*README, "The answer names no issuer"/,
  ]);
});

test("a strict client that gets an ID token is held to the scopes that it asked for", async (t) => {
  const rewrite = (body: string) => body.replace('{"access_token":', '{"id_token":"a.b.c","access_token":');
  const { env } = await startWithTenantThat(t, { kind: "strict", rewrite });
  const report = await runDoctor(env, { login: true });
  assert.match(report.output, /kind of client: strict/);
  assertMissing(report, [4, /OpenID Connect scopes: not granted: .*"OAUTH_SCOPES_MISMATCH"/]);
});

test("a fixed application needs no registration, and one is neither made nor asked for", async (t) => {
  const { tenant, env, url } = await start(t);
  const { client_id: client } = FIXED_CLIENT;
  Object.assign(tenant.settings, configuredTenant("strict", url, "fixed"));
  const report = await runDoctor(env, { client });
  assertMissing(report);
  assert.equal(statusOf(report, /sign-in page: opens/), "ok");
  assert.doesNotMatch(report.output, /registration:/);
  assert.equal(tenant.settings.applications.length, 2);

  Object.assign(tenant.settings, configuredTenant("strict", url, "fixed", "callback"));
  assertMissing(await runDoctor(env, { client }), [
    5,
    /sign-in page: .*Callback URL mismatch.*README, "Callback URL mismatch"/,
  ]);
});

test("a client's document is good once the tenant takes such documents and has imported it", async (t) => {
  const { tenant, env, url } = await start(t);
  const documents = await publishClientMetadata();
  t.after(documents.close);
  const client = documents.url();
  assertMissing(await runDoctor(env, { client }), [2, /client: CIMD is off.*Switch CIMD on/]);
  Object.assign(tenant.settings, configuredTenant("permissive", url, "cimd"));
  assertMissing(await runDoctor(env, { client: `${url}x` }), [
    2,
    /client: http\S+ answers 404 .*copy the address/,
  ]);
  assertMissing(await runDoctor(env, { client }), [
    2,
    /sign-in page: .*Unknown client: http\S+client\.json .*Import/,
  ]);
  await tenant.importFromUrl(client);
  const report = await runDoctor(env, { client });
  assertMissing(report);
  assert.equal(
    statusOf(report, /client: http\S+client\.json, called back at https:\/\/chatgpt\.com\//),
    "ok",
  );
  assert.equal(statusOf(report, /sign-in page: opens/), "ok");
});
