/** `npm run doctor` against tenants: each kind, each setting of the guide left out, and Auth0's ways of refusing. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, beforeEach, describe, test } from "node:test";
import { assertMissing, environment, runDoctor, start, startWithTenantThat, statusOf } from "./run/doctor/report.ts";
import type { Environment } from "./run/doctor/report.ts";
import { MANAGEMENT_SCOPES } from "./support/management.ts";
import { freePort, startServer } from "./support/server.ts";
import { TOKEN } from "./run/setup/report.ts";
import { ALICE, configuredTenant, signIn, startTenant } from "./support/tenant.ts";
import type { Tenant, TenantKind } from "./support/tenant.ts";

const KINDS: TenantKind[] = ["permissive", "strict"];

const tenant = await startTenant();
const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
const env = environment(tenant.origin, server.url);
after(async () => {
  await server.close();
  await tenant.close();
});

/** What each setting of the guide shows when it is left out; where it stops nothing, two at once. */
const LEFT_OUT: {
  settings: string;
  kinds?: TenantKind[];
  leaveOut: (settings: Tenant["settings"]) => void;
  env?: Environment;
  missing: [step: number, said: RegExp][];
  /** What follows from that, and is not said to be missing as well. */
  follows?: RegExp;
}[] = [
  {
    settings: "Dynamic Client Registration, and AUTH0_CLIENT_SECRET",
    leaveOut: (settings) => settings.dynamicClientRegistration = false,
    env: { AUTH0_CLIENT_SECRET: "" },
    missing: [
      [2, /registration: 4\d\d .*registration is disabled.*"Enable client registration"/],
      [6, /token: AUTH0_CLIENT_SECRET is not set/],
    ],
  },
  {
    settings: "room for another application, and the right AUTH0_CLIENT_SECRET",
    leaveOut: (settings) => settings.applicationLimit = 1,
    env: { AUTH0_CLIENT_SECRET: "wrong" },
    missing: [
      [2, /registration: 403 .*You reached the limit.*README, "You reached the limit/],
      [6, /token: 401 .*Unauthorized.*Compare the two settings/],
    ],
  },
  {
    settings: "a domain-level connection, and the machine-to-machine application's authorization",
    leaveOut(settings) {
      for (const connection of settings.connections) connection.domainLevel = false;
      for (const application of settings.applications) application.authorizedApis = [];
    },
    missing: [
      [3, /sign-in page: .*no connections enabled for the client.*README, "no connections enabled/],
      [6, /token: 403 access_denied: Client is not authorized to access .*authorize the application/],
    ],
  },
  {
    settings: "the Identifier of the API",
    kinds: ["strict"],
    leaveOut: (settings) => settings.apis.forEach((api) => api.identifier += "/"),
    missing: [[1, /sign-in page: .*Service not found: http\S+\/mcp .*README, "Service not found"/]],
    follows: /token: .*Service not found: http\S+\/mcp As above at "sign-in page"/,
  },
  {
    settings: "the Identifier of the API, with the Default Audience wrong likewise",
    kinds: ["permissive"],
    leaveOut(settings) {
      for (const api of settings.apis) api.identifier += "/";
      settings.defaultAudience += "/";
    },
    missing: [
      [1, /token: .*Service not found: http\S+\/mcp /],
      [1, /claims: Token has the audience http\S+\/mcp\/,http\S+, expected http\S+\/mcp: /],
    ],
  },
  {
    settings: "the Default Audience, where tokens are then encrypted",
    kinds: ["permissive"],
    leaveOut: (settings) => settings.defaultAudience = "",
    missing: [[2, /kind of token: found an encrypted one \(JWE, 5 parts\), expected a JWT.*"Step 2"/]],
  },
  {
    settings: "the Default Audience, where tokens are then opaque",
    kinds: ["strict"],
    leaveOut: (settings) => Object.assign(settings, { defaultAudience: "", userinfoToken: "opaque" }),
    missing: [[2, /kind of token: found an opaque one, expected a JWT/]],
  },
  {
    settings: "the right Default Audience",
    kinds: ["strict"],
    leaveOut: (settings) => settings.defaultAudience += "/",
    missing: [[2, /sign-in page: .*Service not found: http\S+\/mcp\/ .*Default Audience/]],
  },
  {
    settings: "Default Permissions",
    kinds: ["strict"],
    leaveOut: (settings) => settings.apis.forEach((api) => delete api.defaultPermissionsForThirdPartyApplications),
    missing: [[1, /sign-in page: .*Client "tpc_\w+" is not authorized to access .*Default Permissions/]],
  },
  {
    settings: "Allow Offline Access",
    kinds: ["strict"],
    leaveOut: (settings) => settings.apis.forEach((api) => api.allowOfflineAccess = false),
    missing: [[1, /refresh token: found none.*README, "No refresh token"/]],
  },
  {
    settings: "the Action, and Allow Offline Access",
    kinds: ["permissive"],
    leaveOut(settings) {
      settings.postLoginAction = false;
      for (const api of settings.apis) api.allowOfflineAccess = false;
    },
    missing: [
      [4, /scopes: not granted: \S.* asked .* granted .*"OAUTH_SCOPES_MISMATCH"/],
      [1, /refresh token: found none.*README, "No refresh token"/],
    ],
  },
];

for (const kind of KINDS) {
  describe(`on a ${kind} tenant`, () => {
    beforeEach(() => {
      Object.assign(tenant.settings, configuredTenant(kind, server.url));
    });

    test("every check is ok, as far as the tools for a user who signs in, and no secret is printed", async () => {
      const secrets = ["machine-secret"];
      const report = await runDoctor(env, { login: true }, async (url) => {
        const callback = await signIn(url, ALICE);
        secrets.push(callback.searchParams.get("code") ?? "");
        const forged = new URL(callback);
        forged.searchParams.set("state", "another");
        assert.equal((await fetch(forged)).status, 404); // an answer to a question that was not asked
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

    for (const { settings, kinds = KINDS, leaveOut, env: changes, missing, follows } of LEFT_OUT) {
      if (!kinds.includes(kind)) continue;
      test(`it says what is missing without ${settings}`, async () => {
        leaveOut(tenant.settings);
        const before = tenant.settings.applications.length;
        const report = await runDoctor({ ...env, ...changes }, { login: true });
        assertMissing(report, ...missing);
        if (follows) assert.equal(statusOf(report, follows), "cannot tell");
        // It says so once it has created one, and not before.
        assert.equal(report.output.includes("created"), tenant.settings.applications.length > before);
      });
    }

    if (kind === "permissive") {
      test("without options and credentials nothing is created, and the rest is not claimed", async () => {
        const report = await runDoctor({ ...env, AUTH0_CLIENT_ID: "", AUTH0_CLIENT_SECRET: "" });
        assertMissing(report);
        assert.equal(tenant.settings.applications.length, 1);
        assert.equal(statusOf(report, /npm run doctor -- --register/), "cannot tell");
        assert.equal(statusOf(report, /AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET are not set/), "cannot tell");
        assert.equal(statusOf(report, /npm run doctor -- --login/), "cannot tell");
      });

      test("a user who declines has left no setting out", async () => {
        const report = await runDoctor(env, { login: true }, (url) => signIn(url, ALICE, "decline"));
        assertMissing(report);
        assert.equal(statusOf(report, /sign-in: access_denied: User did not authorize/), "cannot tell");
        assert.equal(statusOf(report, /refresh token: not checked/), "cannot tell");
      });
    }

    if (kind === "strict") {
      test("registration that is off where CIMD is on is not called missing", async () => {
        tenant.settings.dynamicClientRegistration = false;
        tenant.settings.clientIdMetadataDocumentRegistration = true;
        const report = await runDoctor(env, { register: true });
        assertMissing(report);
        assert.equal(statusOf(report, /CIMD: advertised/), "ok");
        assert.equal(statusOf(report, /registration: off, and the way cimd needs none/), "cannot tell");
        assert.equal(statusOf(report, /sign-in page: not checked/), "cannot tell");
      });

      test("the Resource Parameter Profile does for the Default Audience, and any profile of the API", async () => {
        Object.assign(tenant.settings, {
          defaultAudience: "",
          resourceParameterCompatibilityProfile: true,
        });
        for (const api of tenant.settings.apis) api.accessTokenProfile = "rfc9068";
        const report = await runDoctor(env, { login: true });
        assertMissing(report);
        assert.match(report.output, /typ at\+jwt/);
      });
    }
  });
}

describe("with ENFORCE_SCOPES", () => {
  test("a user's permission is missing where RBAC is on and no role gives it", async (t) => {
    const { env, tenant } = await start(t, { ENFORCE_SCOPES: "true" });
    for (const api of tenant.settings.apis) api.enableRbac = true;
    const report = await runDoctor(env, { login: true });
    assertMissing(report, [1, /scopes of the API: found no tasks:read tasks:write.*README, "Permissions per tool"/]);
    assert.match(report.output, /scopes of the API: tasks:read tasks:write/); // of the machine-to-machine token
  });
});

describe("between the doctor and the tenant", () => {
  test("a domain where no tenant answers is what is missing, and HTTPS for any but the stand-in", async (t) => {
    const { env } = await start(t);
    const report = await runDoctor({ ...env, AUTH0_DOMAIN: `https://localhost:${await freePort()}` }, {
      login: true,
    });
    assertMissing(
      report,
      [0, /HTTPS: found http:\S+, expected https.*open a tunnel/],
      [0, /authorization server: found/],
      [0, /discovery: http\S+openid-configuration cannot be reached.*AUTH0_DOMAIN/],
    );
    assert.equal(statusOf(report, /registration: not checked/), "cannot tell");
  });

  test("signing keys that cannot be had are named, and no token is called good without them", async (t) => {
    const { env, tenant } = await start(t);
    tenant.answerJwks = (response) => response.writeHead(500).end();
    const report = await runDoctor(env);
    assertMissing(report, [0, /signing keys: http\S+jwks\.json answers 500.*README, "503 Service Unavailable"/]);
    assert.equal(statusOf(report, /claims: not checked, since it needs the signing keys/), "cannot tell");
  });

  test("a tenant without S256 and a key for RS256 is named for both, and one that is busy for nothing", async (t) => {
    const { tenant, env } = await startWithTenantThat(t, {
      intercept({ url }, response) {
        if (url !== "/oidc/register") return false;
        response.writeHead(429).end("{}");
        return true;
      },
      rewrite: (body) => body.replace('"S256",', ""),
    });
    tenant.answerJwks = (response) => response.end(JSON.stringify({ keys: [{ kty: "EC", alg: "ES256" }] }));
    const report = await runDoctor(env, { register: true });
    assertMissing(
      report,
      [0, /PKCE: found plain, expected S256/],
      [0, /signing keys: found none for RS256 among 1, expected one/],
    );
    assert.equal(statusOf(report, /registration: 429.*try again/), "cannot tell");
  });

  test("a clock that is off is named before the tokens that it spoils", async (t) => {
    const { env } = await startWithTenantThat(t, {
      rewrite(body, headers) {
        headers.set("date", new Date(Date.now() - 120_000).toUTCString());
        return body;
      },
    });
    assertMissing(await runDoctor(env), [
      0,
      /clock: found 12\d s between the tenant's and this.*README, "401 after a good login"/,
    ]);
    const readme = readFileSync(new URL("../README.md", import.meta.url), "utf8");
    assert.match(readme, /^### 401 after a good login\n\n(?:.+\n)*.* clock/m); // the same remedy
  });
});

describe("with AUTH0_MANAGEMENT_TOKEN", () => {
  const managed = { managementTokens: { [TOKEN]: MANAGEMENT_SCOPES } };

  test("the settings come first, and what they cause refers to them", async (t) => {
    const { env, tenant } = await start(t);
    Object.assign(tenant.settings, managed, { defaultAudience: "" });
    const report = await runDoctor({ ...env, AUTH0_MANAGEMENT_TOKEN: TOKEN }, { login: true });
    assertMissing(report, [2, /Default Audience: none → http\S+\/mcp.* npm run setup -- --apply does it/]);
    assert.match(report.output, /^\nThe tenant's settings\. The tenant is permissive\. The way is register/);
    assert.equal(statusOf(report, /kind of token: found an encrypted one .*As above at "Step 2"/), "cannot tell");
    assert.equal(statusOf(report, /Dynamic Client Registration: on/), "ok");
    assert.ok(!report.output.includes(TOKEN));
  });

  test("a way that needs no registration is not told that it is off", async (t) => {
    const { env, tenant, url } = await start(t);
    Object.assign(tenant.settings, configuredTenant("strict", url, "fixed"), managed);
    const report = await runDoctor({ ...env, AUTH0_MANAGEMENT_TOKEN: TOKEN }, { register: true });
    assertMissing(report);
    assert.equal(statusOf(report, /registration: off, and the way fixed needs none/), "cannot tell");
  });

  test("a token that Auth0 refuses leaves the rest as it is without one", async (t) => {
    const { env } = await start(t);
    const report = await runDoctor({ ...env, AUTH0_MANAGEMENT_TOKEN: "of-yesterday" }, { login: true });
    assertMissing(report);
    assert.equal(statusOf(report, /not checked: Auth0 refuses AUTH0_MANAGEMENT_TOKEN/), "cannot tell");
    assert.ok(!report.output.includes("of-yesterday"));
  });
});
