/** What `npm run doctor` says of tenants: of each kind, without each setting of the guide, and at fault. */
import assert from "node:assert/strict";
import { after, beforeEach, describe, test } from "node:test";
import { assertMissing, type Environment, environment, runDoctor, start, statusOf } from "./run/doctor/report.ts";
import { freePort, startServer } from "./support/server.ts";
import { ALICE, configuredTenant, signIn, startTenant, TENANT_KINDS } from "./support/tenant.ts";
import type { Tenant, TenantKind } from "./support/tenant.ts";

const tenant = await startTenant();
const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
const env = environment(tenant.origin, server.url);
after(async () => {
  await server.close();
  await tenant.close();
});

/** What the doctor says where a setting is left out, or two that do not hide each other. */
const LEFT_OUT: Record<string, {
  kinds?: TenantKind[];
  leaveOut: (settings: Tenant["settings"]) => void;
  env?: Environment;
  missing: RegExp[];
  /** A check that fails for the same reason, and is not reported as missing. */
  follows?: RegExp;
}> = {
  "Dynamic Client Registration, and AUTH0_CLIENT_SECRET": {
    leaveOut: (settings) => settings.dynamicClientRegistration = false,
    env: { AUTH0_CLIENT_SECRET: "" },
    missing: [
      /^2b registration: 4\d\d .*registration is disabled.*"Step 2b"/,
      /^6 token: AUTH0_CLIENT_SECRET is not set/,
    ],
  },
  "room for another application, and the right AUTH0_CLIENT_SECRET": {
    leaveOut: (settings) => settings.applicationLimit = 1,
    env: { AUTH0_CLIENT_SECRET: "wrong" },
    missing: [
      /^2b registration: 403 .*You reached the limit.*README, "You reached the limit/,
      /^6 token: 401 .*Unauthorized.*Compare the two settings/,
    ],
  },
  "a domain-level connection, and the machine-to-machine application's authorization": {
    leaveOut(settings) {
      for (const connection of settings.connections) connection.domainLevel = false;
      for (const application of settings.applications) application.authorizedApis = [];
    },
    missing: [
      /^3 sign-in page: .*no connections enabled for the client.*README, "no connections enabled/,
      /^6 token: 403 access_denied: Client is not authorized to access .*authorize the application/,
    ],
  },
  "the Identifier of the API": {
    kinds: ["strict"],
    leaveOut: (settings) => settings.apis.forEach((api) => api.identifier += "/"),
    missing: [/^1 sign-in page: .*Service not found: http\S+\/mcp .*README, "Service not found"/],
    follows: /token: .*Service not found: http\S+\/mcp As above at "sign-in page"/,
  },
  "the Identifier of the API, with the Default Audience wrong likewise": {
    kinds: ["permissive"],
    leaveOut(settings) {
      for (const api of settings.apis) api.identifier += "/";
      settings.defaultAudience += "/";
    },
    missing: [
      /^1 claims: Token has the audience http\S+\/mcp\/,http\S+, expected http\S+\/mcp: /,
      /^1 token: .*Service not found: http\S+\/mcp /,
    ],
  },
  "the Default Audience, where tokens are then encrypted": {
    kinds: ["permissive"],
    leaveOut: (settings) => settings.defaultAudience = "",
    missing: [/^2 kind of token: found an encrypted one \(JWE, 5 parts\), expected a JWT.*"Step 2"/],
  },
  "the Default Audience": {
    kinds: ["strict"],
    leaveOut: (settings) => settings.defaultAudience = "",
    missing: [/^2 sign-in page: .*The userinfo audience .*Set Default Audience or .*"The userinfo audience is not /],
  },
  "the Default Audience, where tokens are then opaque": {
    kinds: ["permissive"],
    leaveOut: (settings) => Object.assign(settings, { defaultAudience: "", userinfoToken: "opaque" }),
    missing: [/^2 kind of token: found an opaque one, expected a JWT/],
  },
  "the right Default Audience": {
    kinds: ["strict"],
    leaveOut: (settings) => settings.defaultAudience += "/",
    missing: [/^2 sign-in page: .*Service not found: http\S+\/mcp\/ .*Default Audience/],
  },
  "Default Permissions": {
    kinds: ["strict"],
    leaveOut: (settings) => settings.apis.forEach((api) => delete api.defaultPermissionsForThirdPartyApplications),
    missing: [/^1 sign-in page: .*Client "tpc_\w+" is not authorized to access .*Default Permissions/],
  },
  "Allow Offline Access": {
    kinds: ["strict"],
    leaveOut: (settings) => settings.apis.forEach((api) => api.allowOfflineAccess = false),
    missing: [/^1 refresh token: found none.*README, "No refresh token"/],
  },
  "the Action, and Allow Offline Access": {
    kinds: ["permissive"],
    leaveOut(settings) {
      settings.postLoginAction = false;
      for (const api of settings.apis) api.allowOfflineAccess = false;
    },
    missing: [
      /^4 .*scopes: not granted: \S.* asked .* granted .*"OAUTH_SCOPES_MISMATCH"/,
      /^1 refresh token: found none.*README, "No refresh token"/,
    ],
  },
};

for (const kind of TENANT_KINDS) {
  describe(`on a ${kind} tenant`, () => {
    beforeEach(() => {
      Object.assign(tenant.settings, configuredTenant(kind, server.url));
    });

    test("the doctor finds every check ok up to a user's tool calls, and prints no secret", async () => {
      const secrets = ["machine-secret"];
      const report = await runDoctor(env, { login: true }, async (url) => {
        const callback = await signIn(url, ALICE);
        secrets.push(callback.searchParams.get("code") ?? "");
        const forged = new URL(callback);
        forged.searchParams.set("state", "another");
        assert.equal((await fetch(forged)).status, 404); // the state is not the doctor's
        return callback;
      });
      assertMissing(report);
      assert.ok(report.checks.every(({ status }) => status === "ok"), report.output);
      assert.match(report.output, new RegExp(`kind of client: ${kind}, as the id hints`));
      assert.match(report.output, kind === "strict" ? /ID token: none/ : /ID token: came/);
      assert.match(report.output, new RegExp(`^ +aud +${server.url}`, "m"));
      assert.match(report.output, /get_profile: \{"id":"machine@clients"\}/);
      assert.match(report.output, /asked +address .*\n +granted +(address .*|offline_access)\n/);
      assert.match(report.output, /refresh token: works, and is rotated/);
      assert.match(report.output, /get_profile: \{"id":"auth0\|alice"\}/);
      assert.equal(secrets.length, 2);
      for (const secret of secrets) assert.ok(secret !== "" && !report.output.includes(secret));
      assert.doesNotMatch(report.output, /eyJ/); // how a JWT begins
      assert.ok(tenant.settings.applications.some(({ name }) => name === "chatgpt-auth0-mcp doctor"));
    });

    for (const [settings, { kinds = TENANT_KINDS, leaveOut, ...expected }] of Object.entries(LEFT_OUT)) {
      if (!kinds.includes(kind)) continue;
      test(`the doctor says what is missing without ${settings}`, async () => {
        leaveOut(tenant.settings);
        const before = tenant.settings.applications.length;
        const report = await runDoctor({ ...env, ...expected.env }, { login: true });
        assertMissing(report, ...expected.missing);
        if (expected.follows) assert.equal(statusOf(report, expected.follows), "cannot tell");
        // It names the application that it has created, and only then.
        assert.equal(report.output.includes("created"), tenant.settings.applications.length > before);
      });
    }

    if (kind === "permissive") {
      test("without options and credentials the doctor registers nothing and checks no token", async () => {
        const report = await runDoctor({ ...env, AUTH0_CLIENT_ID: "", AUTH0_CLIENT_SECRET: "" });
        assertMissing(report);
        assert.equal(tenant.settings.applications.length, 1);
        assert.doesNotMatch(report.output, /^A (client|machine|user)/m);
      });

      test("the doctor blames no setting for a user who declines", async () => {
        const report = await runDoctor(env, { login: true }, (url) => signIn(url, ALICE, "decline"));
        assertMissing(report);
        assert.equal(statusOf(report, /sign-in: access_denied: User did not authorize/), "cannot tell");
        assert.equal(statusOf(report, /refresh token: not checked/), "cannot tell");
      });
    }

    if (kind === "strict") {
      test("the doctor does not call registration missing that is off where CIMD is on", async () => {
        tenant.settings.dynamicClientRegistration = false;
        tenant.settings.clientIdMetadataDocumentRegistration = true;
        const report = await runDoctor(env, { register: true });
        assertMissing(report);
        assert.equal(statusOf(report, /CIMD: advertised/), "ok");
        assert.equal(statusOf(report, /registration: off, and the way cimd needs none/), "cannot tell");
        assert.equal(statusOf(report, /sign-in page: not checked/), "cannot tell");
      });

      test("the doctor accepts the Compatibility Profile, and either token profile of the API", async () => {
        Object.assign(tenant.settings, { defaultAudience: "", resourceParameterCompatibilityProfile: true });
        for (const api of tenant.settings.apis) api.accessTokenProfile = "rfc9068";
        const report = await runDoctor(env, { login: true });
        assertMissing(report);
        assert.match(report.output, /typ at\+jwt/);
      });
    }
  });
}

test("with ENFORCE_SCOPES the doctor reports the permissions of a user without a role where RBAC is on", async (t) => {
  const { env, tenant } = await start(t, { ENFORCE_SCOPES: "true" });
  for (const api of tenant.settings.apis) api.enableRbac = true;
  const report = await runDoctor(env, { login: true });
  assertMissing(report, /^1 scopes of the API: found no tasks:read tasks:write.*README, "Permissions per tool"/);
  assert.match(report.output, /scopes of the API: tasks:read tasks:write/); // of the machine-to-machine token
});

test("the doctor reports a domain where no tenant answers, and a server without HTTPS", async (t) => {
  const { env } = await start(t);
  const report = await runDoctor({ ...env, AUTH0_DOMAIN: `https://localhost:${await freePort()}` }, { login: true });
  assertMissing(
    report,
    /^0 HTTPS: found http:\S+, expected https.*open a tunnel/,
    /^0 authorization server: found/,
    /^0 discovery: http\S+openid-configuration cannot be reached.*AUTH0_DOMAIN/,
  );
  assert.equal(statusOf(report, /registration: not checked/), "cannot tell");
});

test("the doctor reports signing keys that cannot be fetched, and calls no token good without them", async (t) => {
  const { env, tenant } = await start(t);
  tenant.answerJwks = (response) => response.writeHead(500).end();
  const report = await runDoctor(env);
  assertMissing(report, /^0 signing keys: http\S+jwks\.json answers 500.*README, "503 Service Unavailable"/);
  assert.equal(statusOf(report, /claims: not checked, since it needs "signing keys"/), "cannot tell");
});

test("the doctor calls S256 and a key for RS256 missing, but not what a 429 hides", async (t) => {
  const { tenant, env } = await start(t);
  tenant.beforeAnswer = async ({ route }, answer) =>
    route === "POST /oidc/register"
      ? new Response("{}", { status: 429 })
      : Response.json({ ...await (await answer()).json(), code_challenge_methods_supported: ["plain"] });
  tenant.answerJwks = (response) => response.end(JSON.stringify({ keys: [{ kty: "EC", alg: "ES256" }] }));
  const report = await runDoctor(env, { register: true });
  assertMissing(
    report,
    /^0 PKCE: found plain, expected S256/,
    /^0 signing keys: found none for RS256 among 1, expected one/,
  );
  assert.equal(statusOf(report, /registration: 429.*try again/), "cannot tell");
});

test("the doctor reports a wrong clock before the tokens that fail because of it", async (t) => {
  const { tenant, env } = await start(t);
  tenant.beforeAnswer = async (_, answer) => {
    const reply = await answer();
    reply.headers.set("date", new Date(Date.now() - 120_000).toUTCString());
    return reply;
  };
  assertMissing(
    await runDoctor(env),
    /^0 clock: found 12\d s between the tenant's and this.*README, "401 after a good login"/,
  );
});

test("with AUTH0_MANAGEMENT_TOKEN the doctor reads settings first, and names them as causes", async (t) => {
  const { env, tenant } = await start(t);
  tenant.settings.defaultAudience = "";
  const token = await tenant.signManagementToken();
  const report = await runDoctor({ ...env, AUTH0_MANAGEMENT_TOKEN: token }, { login: true });
  assertMissing(report, /^2 audience: none → .*Compatibility Profile on.* npm run setup -- --apply does it/);
  assert.match(report.output, /^\nThe tenant's settings\. The tenant is permissive\. The way is register/);
  assert.equal(statusOf(report, /kind of token: found an encrypted .*As above at "audience"/), "cannot tell");
  assert.equal(statusOf(report, /Dynamic Client Registration: on/), "ok");
  assert.ok(!report.output.includes(token));
});

test("with AUTH0_MANAGEMENT_TOKEN the doctor asks for no registration where the tenant's way needs none", async (t) => {
  const { env, tenant, url } = await start(t);
  Object.assign(tenant.settings, configuredTenant("strict", url, "fixed"));
  const token = await tenant.signManagementToken();
  const report = await runDoctor({ ...env, AUTH0_MANAGEMENT_TOKEN: token }, { register: true });
  assertMissing(report);
  assert.equal(statusOf(report, /registration: off, and the way fixed needs none/), "cannot tell");
});

test("an AUTH0_MANAGEMENT_TOKEN that Auth0 refuses does not stop the doctor's other checks", async (t) => {
  const { env, tenant } = await start(t);
  const token = await tenant.signManagementToken({ exp: 1 });
  const report = await runDoctor({ ...env, AUTH0_MANAGEMENT_TOKEN: token }, { login: true });
  assertMissing(report);
  assert.equal(statusOf(report, /not checked: Auth0 refuses AUTH0_MANAGEMENT_TOKEN/), "cannot tell");
  assert.ok(!report.output.includes(token));
});
