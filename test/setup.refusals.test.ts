/** `npm run setup` where the tenant has something there already: other values, an Action, several connections. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { ACTION_CODE } from "./support/management.ts";
import { APPLY, left, reset, runSetup, SERVER_URL } from "./support/setup.ts";
import { configuredTenant, startTenant, type Tenant } from "./support/tenant.ts";

let tenant: Tenant;
before(async () => {
  tenant = await startTenant();
});
after(() => tenant.close());

const REGISTER = { way: "register" };

describe("What is there already is not overwritten, but said, with the choice", () => {
  const cases: Record<string, { change: () => void; line: string; said: RegExp }> = {
    "a Default Audience of another API": {
      change: () => tenant.settings.defaultAudience = "https://other.example.com/",
      line: "by hand: 2 Default Audience",
      said: /https:\/\/other\.example\.com\/, on which other applications may depend Take a tenant of its own/,
    },
    "an Action of the same name with other code": {
      change: () => {
        const name = "Add Scopes for ChatGPT";
        tenant.settings.actions = [{ id: "act_1", name, code: "other", deployedCode: "other" }];
        tenant.settings.flow = [];
      },
      line: "by hand: 4 Action",
      said: /with other code than auth0-action\.js Compare the two under Actions → Library/,
    },
    "Default Permissions with other scopes": {
      change: () =>
        tenant.settings.apis.forEach((api) => api.defaultPermissionsForThirdPartyApplications = ["tasks:read"]),
      line: "by hand: 1 Default Permissions",
      said: /tasks:read, where tasks:read tasks:write is needed .* take another MCP_SERVER_URL/,
    },
    "an API that signs with HS256": {
      change: () => tenant.settings.apis.forEach((api) => api.signingAlgorithm = "HS256"),
      line: "by hand: 1 API",
      said: /it signs with HS256, and the server takes RS256 alone .* take another MCP_SERVER_URL/,
    },
    "an API that encrypts its tokens": {
      change: () => tenant.settings.apis.forEach((api) => api.encryptsTokens = true),
      line: "by hand: 1 API",
      said: /it encrypts its tokens \(JWE\)/,
    },
    "an API that no application may call for a user": {
      change: () => tenant.settings.apis.forEach((api) => api.userAccessPolicy = "deny_all"),
      line: "by hand: 1 API",
      said: /lets no application call it on behalf of a user/,
    },
  };
  for (const [name, { change, line, said }] of Object.entries(cases)) {
    test(name, async () => {
      const kind = line.includes("Default Permissions") ? "strict" : "permissive";
      reset(tenant, configuredTenant(kind, SERVER_URL));
      if (line.includes("Action")) tenant.settings.postLoginAction = false;
      change();
      const before = structuredClone(tenant.settings);
      const report = await runSetup(tenant, { ...REGISTER, ...APPLY });
      assert.equal(report.status, 1);
      assert.deepEqual(left(report), [line]);
      assert.match(report.lines.find(({ mark }) => mark === "by hand")?.said ?? "", said);
      assert.deepEqual(tenant.settings, before);
    });
  }

  test("what comes before it is done, what comes after it waits", async () => {
    reset(tenant, { kind: "permissive", defaultAudience: "https://other.example.com/" });
    const { status, output } = await runSetup(tenant, { ...REGISTER, ...APPLY });
    assert.equal(status, 1);
    assert.match(
      output,
      /Stopped at what is by hand: Step 2, Default Audience\. Run this again when it is done\.$/,
    );
    assert.equal(tenant.settings.apis.length, 1);
    assert.equal(tenant.settings.defaultAudience, "https://other.example.com/");
    assert.equal(tenant.settings.connections[0]?.domainLevel, false);
  });

  test("what is there when the person says yes counts, not what was shown before", async () => {
    reset(tenant, configuredTenant("permissive", SERVER_URL, "register", "default-audience"));
    const ask = () => {
      tenant.settings.defaultAudience = "https://other.example.com/";
      return Promise.resolve(true);
    };
    const { status } = await runSetup(tenant, { ...REGISTER, apply: true }, { ask });
    assert.equal(status, 1);
    assert.equal(tenant.settings.defaultAudience, "https://other.example.com/");
  });

  test("permissions of the API stay beside those that are added", async () => {
    reset(tenant, configuredTenant("permissive", SERVER_URL));
    tenant.settings.apis.forEach((api) => api.permissions = ["notes:read", "tasks:read"]);
    assert.equal((await runSetup(tenant, { ...REGISTER, ...APPLY })).status, 0);
    assert.deepEqual(tenant.settings.apis[0]?.permissions, ["notes:read", "tasks:read", "tasks:write"]);
  });

  for (const defaultAudience of ["", "https://other.example.com/"]) {
    test(`the Resource Parameter Compatibility Profile does for the Default Audience "${defaultAudience}"`, async () => {
      reset(tenant, configuredTenant("permissive", SERVER_URL));
      Object.assign(tenant.settings, { defaultAudience, resourceParameterCompatibilityProfile: true });
      const { status, output } = await runSetup(tenant, REGISTER);
      assert.equal(status, 0, output);
      assert.match(output, /Default Audience: \S+, but the Resource Parameter Compatibility Profile is on/);
    });
  }
});

describe("The Action", () => {
  const others = Array.from({ length: 70 }, (_, number) => ({
    action: { id: `act_${number}`, name: `Other ${number}`, code: "other", deployedCode: "other" },
    binding: { id: `bnd_${number}`, actionId: `act_${number}`, displayName: `Other ${number}` },
  }));

  test("comes last in the flow, and the others stay in their order, on whatever page they stand", async () => {
    reset(tenant, { ...configuredTenant("permissive", SERVER_URL), postLoginAction: false });
    tenant.settings.actions = others.map(({ action }) => action);
    tenant.settings.flow = others.map(({ binding }) => binding);
    assert.equal((await runSetup(tenant, { ...REGISTER, ...APPLY })).status, 0);
    const names = tenant.settings.flow?.map(({ displayName }) => displayName);
    assert.deepEqual(names, [...others.map(({ action }) => action.name), "Add Scopes for ChatGPT"]);
    assert.deepEqual(tenant.settings.flow?.slice(0, 70), others.map(({ binding }) => binding));
    assert.equal(tenant.settings.postLoginAction, true);
  });

  const ours = { id: "act_ours", name: "ChatGPT scopes", code: ACTION_CODE.replaceAll("\n", "\r\n") };
  const states = {
    "pasted by hand and not deployed": [[ours], []],
    "deployed and not in the flow": [[{ ...ours, deployedCode: ACTION_CODE }], []],
    "in the flow with an older code": [
      [{ ...ours, deployedCode: "older" }],
      [{ id: "bnd_ours", actionId: ours.id, displayName: "ours" }],
    ],
  } as const;
  for (const [name, [actions, flow]] of Object.entries(states)) {
    test(`${name}, under whatever name, is taken up where it is`, async () => {
      reset(tenant, { ...configuredTenant("permissive", SERVER_URL), postLoginAction: false });
      tenant.settings.actions = actions.map((action) => ({ ...action }));
      tenant.settings.flow = [...flow];
      assert.deepEqual(left(await runSetup(tenant, REGISTER)), ["to do: 4 Action"]);
      assert.equal((await runSetup(tenant, { ...REGISTER, ...APPLY })).status, 0);
      assert.deepEqual(tenant.settings.actions?.map(({ id }) => id), [ours.id]);
      assert.deepEqual(tenant.settings.flow?.map(({ actionId }) => actionId), [ours.id]);
    });
  }

  test("that is never built is said", async () => {
    reset(tenant, { ...configuredTenant("permissive", SERVER_URL), postLoginAction: false });
    tenant.settings.actions = [{ ...ours, building: 100 }];
    tenant.settings.flow = [];
    const { status, output, waited } = await runSetup(tenant, { ...REGISTER, ...APPLY });
    assert.equal(status, 1);
    assert.match(output, /actions\/actions\/act_ours is not ready after half a minute/);
    assert.equal(waited.length, 30);
  });
});

describe("Of several connections", () => {
  const connections = Array.from(
    { length: 120 },
    (_, number) => ({ name: `Connection-${number}`, domainLevel: false }),
  );
  const several = () => {
    reset(tenant, configuredTenant("strict", SERVER_URL));
    tenant.settings.connections = connections.map((connection) => ({ ...connection }));
  };
  const promoted = () => tenant.settings.connections.filter(({ domainLevel }) => domainLevel).map(({ name }) => name);

  test("none is promoted without being named", async () => {
    several();
    const { status, lines } = await runSetup(tenant, { ...REGISTER, ...APPLY });
    assert.equal(status, 1);
    const { said = "" } = lines.find(({ mark }) => mark === "by hand") ?? {};
    assert.match(said, /Choose one with --connection NAME: Connection-0, .*, Connection-119$/);
    assert.deepEqual(promoted(), []);
  });

  test("the named one is promoted, on whatever page it stands", async () => {
    several();
    const { status } = await runSetup(tenant, { ...REGISTER, ...APPLY, connection: "Connection-119" });
    assert.equal(status, 0);
    assert.deepEqual(promoted(), ["Connection-119"]);
  });

  test("one that is promoted already will do, unless another is named", async () => {
    several();
    Object.assign(tenant.settings.connections[110] ?? {}, { domainLevel: true });
    assert.equal((await runSetup(tenant, REGISTER)).status, 0);
    assert.equal((await runSetup(tenant, { ...REGISTER, ...APPLY, connection: "Connection-3" })).status, 0);
    assert.deepEqual(promoted(), ["Connection-3", "Connection-110"]);
  });

  test("an unknown one is said, and none at all as well", async () => {
    several();
    const unknown = await runSetup(tenant, { ...REGISTER, ...APPLY, connection: "Conection-3" });
    assert.equal(unknown.status, 1);
    assert.match(
      unknown.output,
      /none is called Conection-3\n +Choose one with --connection NAME: Connection-0/,
    );
    tenant.settings.connections = [];
    assert.match(
      (await runSetup(tenant, REGISTER)).output,
      /none\n +Create one: Authentication → Database or Social$/m,
    );
  });
});
