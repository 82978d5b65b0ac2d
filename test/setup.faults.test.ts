/** `npm run setup` when Auth0 fails, refuses or limits, and when the tenant has something there already. */
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { publishClientMetadata } from "./support/chatgpt.ts";
import { ACTION_CODE, MANAGEMENT_SCOPES } from "./support/management.ts";
import { freePort } from "./support/server.ts";
import { APPLY, left, recordRequests, reset, runSetup, SERVER_URL, TOKEN } from "./run/setup/report.ts";
import { configuredTenant, startTenant } from "./support/tenant.ts";

const tenant = await startTenant();
const clientDocuments = await publishClientMetadata();
after(async () => {
  await clientDocuments.close();
  await tenant.close();
});

const REGISTER = { way: "register" };
const isWrite = (request: string) => !request.startsWith("GET ");

describe("After a failure in the middle the next run goes on", () => {
  /** The request that fails: before Auth0 does what it asks, or after, so that only the answer is lost. */
  async function failAt(
    number: number,
    isDone: boolean,
    options: { way: string; document?: string },
  ): Promise<boolean> {
    let writes = 0;
    tenant.beforeManagement = async (request, answer) => {
      if (!isWrite(request) || ++writes !== number) return await answer();
      if (isDone) await answer();
      return new Response("<html>Bad Gateway</html>", {
        status: 502,
        headers: { "content-type": "text/html" },
      });
    };
    const failed = await runSetup(tenant, { ...options, ...APPLY });
    tenant.beforeManagement = (_, answer) => answer();
    if (failed.status === 0) return false; // there was no such request any more
    assert.match(failed.output, /\n(POST|PATCH) \S+: 502, and not in Auth0's words\. .*$/);
    const { status, output } = await runSetup(tenant, { ...options, ...APPLY });
    assert.equal(status, 0, output);
    return true;
  }

  for (const [kind, way, requests] of [["permissive", "register", 7], ["strict", "cimd", 7]] as const) {
    for (const isDone of [false, true]) {
      test(`${way} on a ${kind} tenant, ${isDone ? "when each answer is lost" : "when each request is refused"}`, async () => {
        const options = { way, ...(way === "cimd" && { document: clientDocuments.url() }) };
        let failures = 0;
        do {
          reset(tenant, { kind });
        } while (await failAt(++failures, isDone, options));
        assert.equal(failures - 1, requests);
        assert.equal(tenant.settings.apis.length, 1);
        assert.equal(tenant.settings.applications.length, way === "cimd" ? 1 : 0);
        assert.equal(tenant.settings.flow?.length ?? 0, way === "cimd" ? 0 : 1);
      });
    }
  }
});

describe("Auth0's errors are one line", () => {
  test("without a token: how to get one", async () => {
    reset(tenant);
    const { status, output } = await runSetup(tenant, {}, { env: { AUTH0_MANAGEMENT_TOKEN: "" } });
    assert.equal(status, 1);
    assert.match(output, /^AUTH0_MANAGEMENT_TOKEN is missing: copy it from Auth0 Dashboard → .* API Explorer.*$/);
  });

  test("a token that Auth0 refuses", async () => {
    reset(tenant);
    const { status, output } = await runSetup(tenant, {}, { env: { AUTH0_MANAGEMENT_TOKEN: "another" } });
    assert.equal(status, 1);
    assert.equal(output, "Auth0 refuses AUTH0_MANAGEMENT_TOKEN: Invalid token. Copy a new one, as --help says");
  });

  test("a scope that the token lacks is named, whichever it is", async () => {
    const unnamed = [];
    for (const scope of MANAGEMENT_SCOPES) {
      const managementTokens = { [TOKEN]: MANAGEMENT_SCOPES.filter((one) => one !== scope) };
      const outputs = [];
      for (const options of [{ way: "register" }, { way: "cimd", document: clientDocuments.url() }]) {
        reset(tenant, { kind: options.way === "cimd" ? "strict" : "permissive", managementTokens });
        // What an API has, so that there is something to change of it, too.
        if (scope === "update:resource_servers") {
          tenant.settings.apis = configuredTenant("strict", SERVER_URL, "cimd", "offline-access").apis;
        }
        const { output } = await runSetup(tenant, { ...options, ...APPLY });
        outputs.push(output);
      }
      const line = new RegExp(`^\\w+ \\S+: AUTH0_MANAGEMENT_TOKEN lacks a scope: .*${scope}`, "m");
      if (!outputs.some((output) => line.test(output))) unnamed.push(scope);
    }
    assert.deepEqual(unnamed, []);
  });

  test("a document that is refused: the other ways", async () => {
    reset(tenant, { kind: "strict" });
    const document = clientDocuments.url().replace("/oauth/client.json", "/none/oauth/client.json");
    tenant.settings.applicationLimit = 0;
    const { status, output } = await runSetup(tenant, { document, ...APPLY });
    assert.equal(status, 1);
    assert.match(
      output,
      /\nPOST clients\/cimd\/register: 403: You reached the limit .* take --way register or --way fixed$/,
    );
  });

  test("a tenant that cannot be reached", async () => {
    const origin = `http://localhost:${await freePort()}`;
    const { status, output } = await runSetup(tenant, {}, { env: { AUTH0_DOMAIN: origin } });
    assert.equal(status, 1);
    assert.match(output, new RegExp(`^${origin} cannot be reached: [^\n]+$`));
  });

  test("an answer that is not Auth0's, or not as expected", async () => {
    reset(tenant);
    tenant.beforeManagement = () => Promise.resolve(new Response("<html>It works!</html>"));
    assert.match((await runSetup(tenant)).output, /^GET tenants\/settings: 200, and not in Auth0's words\. [^\n]+$/);
    tenant.beforeManagement = () => Promise.resolve(Response.json({ default_audience: 1 }));
    assert.match((await runSetup(tenant)).output, /^GET tenants\/settings: an answer that is not expected\. [^\n]+$/);
  });

  test("a change that Auth0 takes and does not make", async () => {
    reset(tenant);
    tenant.beforeManagement = (request, answer) => isWrite(request) ? Promise.resolve(Response.json({})) : answer();
    const { status, output } = await runSetup(tenant, { ...REGISTER, ...APPLY });
    assert.equal(status, 1);
    assert.match(output, /\nAPI: Auth0 took the change, and still says none with this Identifier$/);
  });

  test("--way and --document that cannot be", async () => {
    reset(tenant);
    assert.equal((await runSetup(tenant, { way: "dcr" })).output, "--way must be one of cimd, register, fixed");
    assert.equal((await runSetup(tenant, { document: "client.json" })).output, "--document must be a URL");
  });
});

describe("A limited rate is waited for", () => {
  const limit = (times: number, headers: Record<string, string>) => {
    let left = times;
    tenant.beforeManagement = (_, answer) => {
      if (left-- <= 0) return answer();
      const body = { statusCode: 429, error: "Too Many Requests", message: "Global limit has been reached" };
      return Promise.resolve(Response.json(body, { status: 429, headers }));
    };
  };

  test("as long as Auth0 says, in seconds or as a point in time", async () => {
    reset(tenant);
    limit(2, { "retry-after": "3" });
    assert.deepEqual((await runSetup(tenant, REGISTER)).waited, [3, 3]);
    limit(1, { "x-ratelimit-reset": String(Math.floor(Date.now() / 1_000) + 7) });
    const { waited: [seconds = 0], output } = await runSetup(tenant, REGISTER);
    assert.ok(seconds > 0 && seconds <= 7, `${seconds}`);
    assert.match(output, /^Auth0 limits the rate: going on in \d s\n/);
  });

  test("while nothing is done twice", async () => {
    reset(tenant);
    const requests = recordRequests(tenant);
    const record = tenant.beforeManagement;
    let turn = 0;
    tenant.beforeManagement = (request, answer) =>
      ++turn % 2 ? Promise.resolve(Response.json({ message: "Too many" }, { status: 429 })) : record(request, answer);
    assert.equal((await runSetup(tenant, { ...REGISTER, ...APPLY })).status, 0);
    assert.equal(requests.filter(isWrite).length, 7);
  });

  test("but not for ever", async () => {
    reset(tenant);
    limit(Infinity, {});
    const { status, output, waited } = await runSetup(tenant, REGISTER);
    assert.deepEqual([status, waited], [1, [1, 1, 1, 1, 1]]);
    assert.match(output, /\nGET tenants\/settings: 429: Global limit has been reached$/);
  });
});

describe("The token is never printed", () => {
  test("whoever quotes it, and terminal codes are not either", async () => {
    reset(tenant);
    tenant.settings.connections = [{ name: `\u001b[2J${TOKEN}`, domainLevel: true }];
    const { output } = await runSetup(tenant, REGISTER);
    assert.match(output, /connection at domain level: \?\[2J\(hidden\)$/m);
    assert.ok(!output.includes(TOKEN));
  });

  test("when it cannot be one", async () => {
    reset(tenant);
    const { status, output } = await runSetup(tenant, {}, { env: { AUTH0_MANAGEMENT_TOKEN: "two\nlines" } });
    assert.equal(status, 1);
    assert.equal(output, "AUTH0_MANAGEMENT_TOKEN is not a token: copy it whole, and nothing else");
  });
});

test("a custom domain will do, though the tenant has another", async () => {
  reset(tenant, { kind: "strict" });
  const env = { AUTH0_DOMAIN: tenant.origin.replace("localhost", "127.0.0.1") };
  assert.equal((await runSetup(tenant, { ...REGISTER, ...APPLY }, { env })).status, 0);
  assert.deepEqual(left(await runSetup(tenant, REGISTER)), []);
});

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
    assert.match(output, /Stopped at what is by hand: Step 2, Default Audience\. Run this again when it is done\.$/);
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
    assert.match(unknown.output, /none is called Conection-3\n +Choose one with --connection NAME: Connection-0/);
    tenant.settings.connections = [];
    assert.match(
      (await runSetup(tenant, REGISTER)).output,
      /none\n +Create one: Authentication → Database or Social$/m,
    );
  });
});
