/** `npm run setup` where Auth0 fails, refuses or limits requests, and where the tenant has settings already. */
import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { APPLY, left, recordRequests, reset, runSetup, SERVER_URL } from "./run/setup/report.ts";
import { publishClientMetadata } from "./support/chatgpt.ts";
import { MANAGEMENT_SCOPES } from "./support/management.ts";
import { freePort } from "./support/server.ts";
import { ACTION_CODE, type Api, configuredTenant, startTenant } from "./support/tenant.ts";

const tenant = await startTenant();
const clientDocuments = await publishClientMetadata();
after(async () => {
  await clientDocuments.close();
  await tenant.close();
});

const REGISTER = { way: "register" };
const isWrite = (request: string) => !request.startsWith("GET ");
const show = (env: Record<string, string> = {}) => runSetup(tenant, REGISTER, { env });
const apply = (options = {}) => runSetup(tenant, { ...REGISTER, ...APPLY, ...options });

for (const [kind, way] of [["permissive", "register"], ["strict", "cimd"]] as const) {
  for (const isDone of [false, true]) {
    test(`setup for ${way} completes on a rerun after any ${isDone ? "lost answer" : "failed change"}`, async () => {
      const options = { way, ...(way === "cimd" && { document: clientDocuments.url() }) };
      for (let failing = 1; failing <= 7; failing++) {
        reset(tenant, { kind });
        let writes = 0;
        tenant.beforeManagement = async (request, answer) => {
          if (!isWrite(request) || ++writes !== failing) return await answer();
          if (isDone) await answer();
          return new Response("<html>Bad Gateway</html>", { status: 502, headers: { "content-type": "text/html" } });
        };
        const failed = await apply(options);
        assert.match(failed.output, /\n(POST|PATCH) \S+: 502, and not in Auth0's words\. .*$/);
        const { status, output } = await apply(options);
        assert.deepEqual([status, writes], [0, isDone ? 7 : 8], output);
      }
      assert.equal(tenant.settings.apis.length, 1);
      assert.equal(tenant.settings.applications.length, way === "cimd" ? 1 : 0);
      assert.equal(tenant.settings.flow?.length ?? 0, way === "cimd" ? 0 : 1);
    });
  }
}

test("without a token, setup says how to get one", async () => {
  const { status, output } = await show({ AUTH0_MANAGEMENT_TOKEN: "" });
  assert.equal(status, 1);
  assert.match(output, /^AUTH0_MANAGEMENT_TOKEN is missing: copy it from Auth0 Dashboard → .* API Explorer.*$/);
});

test("setup says to copy a new token where Auth0 refuses the one it is given", async () => {
  const { status, output } = await show({ AUTH0_MANAGEMENT_TOKEN: await tenant.signManagementToken({ exp: 1 }) });
  assert.equal(status, 1);
  assert.equal(output, "Auth0 refuses AUTH0_MANAGEMENT_TOKEN: Invalid token. Copy a new one, as --help says");
});

test("setup names the scope that the token lacks, whichever it is", async () => {
  const unnamed = [];
  for (const lacking of MANAGEMENT_SCOPES) {
    const scope = MANAGEMENT_SCOPES.filter((one) => one !== lacking).join(" ");
    const env = { AUTH0_MANAGEMENT_TOKEN: await tenant.signManagementToken({ scope }) };
    const line = new RegExp(`^\\w+ \\S+: AUTH0_MANAGEMENT_TOKEN lacks a scope: .*${lacking}`, "m");
    let isNamed = false;
    for (const [kind, way] of [["permissive", "register"], ["strict", "cimd"]] as const) {
      reset(tenant, { kind });
      // An API that exists, so that setup has to change it.
      if (lacking === "update:resource_servers") {
        tenant.settings.apis = configuredTenant("strict", SERVER_URL, "cimd", "offline-access").apis;
      }
      const { output } = await runSetup(tenant, { way, document: clientDocuments.url(), ...APPLY }, { env });
      isNamed ||= line.test(output);
    }
    if (!isNamed) unnamed.push(lacking);
  }
  assert.deepEqual(unnamed, []);
});

test("setup suggests the other ways where Auth0 refuses ChatGPT's document", async () => {
  reset(tenant, { kind: "strict", applicationLimit: 0 });
  const { status, output } = await apply({ way: "cimd", document: clientDocuments.url() });
  assert.equal(status, 1);
  assert.match(output, /\nPOST clients\/cimd\/register: 403: You reached .* take --way register or --way fixed$/);
});

test("setup names a tenant that it cannot reach", async () => {
  const origin = `http://localhost:${await freePort()}`;
  const token = await tenant.signManagementToken({ aud: `${origin}/api/v2/` });
  const { status, output } = await show({ AUTH0_DOMAIN: origin, AUTH0_MANAGEMENT_TOKEN: token });
  assert.equal(status, 1);
  assert.match(output, new RegExp(`^${origin} cannot be reached: [^\n]+$`));
});

test("setup names the request whose answer is not Auth0's, or not as expected", async () => {
  reset(tenant);
  tenant.beforeManagement = () => Promise.resolve(new Response("<html>It works!</html>"));
  assert.match((await show()).output, /^GET tenants\/settings: 200, and not in Auth0's words\. [^\n]+$/);
  tenant.beforeManagement = () => Promise.resolve(Response.json({ default_audience: 1 }));
  assert.match((await show()).output, /^GET tenants\/settings: an answer that is not expected\. [^\n]+$/);
});

test("setup stops where Auth0 accepts a change and does not make it", async () => {
  reset(tenant);
  tenant.beforeManagement = (request, answer) => isWrite(request) ? Promise.resolve(Response.json({})) : answer();
  const { status, output } = await apply();
  assert.equal(status, 1);
  assert.match(output, /\nAPI: Auth0 took the change, and still says none with this Identifier$/);
});

test("setup stops where Auth0's pages have no end", async () => {
  reset(tenant);
  const endless = () => Promise.resolve(Response.json({ connections: [], next: "again" }));
  tenant.beforeManagement = (request, answer) => request.includes("connections") ? endless() : answer();
  assert.match((await show()).output, /GET connections\S*: the pages have no end$/);
});

test("setup stops where something undoes its changes", async () => {
  reset(tenant, configuredTenant("permissive", SERVER_URL, "register", "default-audience"));
  let last = "";
  tenant.beforeManagement = (request, answer) => {
    const isReadAfterWrite = last.startsWith("PATCH tenants");
    last = request;
    if (!isReadAfterWrite) tenant.settings.resourceParameterCompatibilityProfile = false;
    return answer();
  };
  assert.match((await apply()).output, /\nSomething undoes these changes: find out what, and run this again$/);
});

describe("Auth0's rate limit", () => {
  /** Answers some requests with 429. */
  function refuse(isRefused: (request: string) => boolean, headers: Record<string, string> = {}): void {
    const answerNext = tenant.beforeManagement;
    const body = { statusCode: 429, error: "Too Many Requests", message: "Global limit has been reached" };
    tenant.beforeManagement = (request, answer) =>
      isRefused(request) ? Promise.resolve(Response.json(body, { status: 429, headers })) : answerNext(request, answer);
  }

  test("setup waits after a 429 as long as Auth0 says, in seconds or as a point in time", async () => {
    const showAfterRefusal = (headers: Record<string, string>) => {
      let left = 1;
      reset(tenant);
      refuse(() => left-- > 0, headers);
      return show();
    };
    assert.deepEqual((await showAfterRefusal({ "retry-after": "3" })).waited, [3]);
    const reset7 = { "x-ratelimit-reset": String(Math.floor(Date.now() / 1_000) + 7) };
    const { waited: [seconds = 0], output } = await showAfterRefusal(reset7);
    assert.ok(seconds > 0 && seconds <= 7, `${seconds}`);
    assert.match(output, /^Auth0 limits the rate: going on in \d s\n/);
  });

  test("setup repeats no change after a 429, and keeps an Action added to the flow while it waits", async () => {
    reset(tenant);
    const requests = recordRequests(tenant);
    const refused = new Set<string>();
    refuse((request) => {
      if (refused.has(request)) return false;
      refused.add(request);
      if (request.startsWith("PATCH actions")) {
        tenant.settings.actions?.push({ id: "act_1", name: "Other", code: "", deployed_version: { code: "" } });
        tenant.settings.flow = [{ id: "bnd_1", action: { id: "act_1" }, display_name: "Other" }];
      }
      return true;
    });
    const { status, output } = await apply();
    assert.equal(status, 0, output);
    assert.equal(requests.filter(isWrite).length, 7);
    assert.deepEqual(tenant.settings.flow?.map((binding) => binding.display_name), ["Other", "Add Scopes for ChatGPT"]);
  });

  for (const [kind, isRefused] of Object.entries({ read: () => true, write: isWrite })) {
    test(`setup gives up on a ${kind} that is answered 429 six times`, async () => {
      reset(tenant);
      refuse(isRefused);
      const { status, output, waited } = await apply();
      assert.deepEqual([status, waited], [1, [1, 1, 1, 1, 1]]);
      assert.match(output, /\n(GET tenants\/settings|POST resource-servers): 429: Global limit has been reached$/);
    });
  }
});

test("setup prints neither the token nor control characters, even if a name in the tenant holds them", async () => {
  const token = await tenant.signManagementToken();
  reset(tenant, { connections: [{ name: `\u001b[2J${token}`, domainLevel: true }] });
  const { output } = await show({ AUTH0_MANAGEMENT_TOKEN: token });
  assert.match(output, /connection at domain level: \?\[2J\(hidden\)$/m);
  assert.ok(!output.includes(token));
});

test("setup does not print an AUTH0_MANAGEMENT_TOKEN that is no token", async () => {
  for (const token of ["two\nlines", "one.two.three", "head\n.eyJhdWQiOiJhIn0.signature"]) {
    const { status, output } = await show({ AUTH0_MANAGEMENT_TOKEN: token });
    assert.equal(status, 1);
    assert.equal(
      output,
      "AUTH0_MANAGEMENT_TOKEN is not a token: copy it whole from the API Explorer, and nothing else",
    );
  }
});

test("setup refuses a token for another API", async () => {
  const env = { AUTH0_MANAGEMENT_TOKEN: await tenant.signManagementToken({ aud: SERVER_URL }) };
  const { status, output } = await show(env);
  assert.equal(status, 1);
  assert.match(output, new RegExp(`^AUTH0_MANAGEMENT_TOKEN is for ${SERVER_URL}, not for Auth0's Management API: `));
});

test("setup does not send the token to a custom domain, but to the tenant that issued it", async (t) => {
  reset(tenant, configuredTenant("strict", SERVER_URL));
  const customDomain = await startTenant(); // publishes the same keys
  t.after(() => customDomain.close());
  const requests = recordRequests(customDomain);
  assert.equal((await show({ AUTH0_DOMAIN: customDomain.origin })).status, 0);
  assert.deepEqual(requests, []);
});

test("setup sends the token nowhere where AUTH0_DOMAIN is another tenant, or no tenant at all", async (t) => {
  reset(tenant);
  const other = await startTenant();
  t.after(() => other.close());
  await other.rotateKeys({ withdraw: true });
  const requests = [recordRequests(tenant), recordRequests(other)];
  for (const url of [other.origin, `http://localhost:${await freePort()}`, clientDocuments.url()]) {
    const { origin, host } = new URL(url);
    const { status, output } = await show({ AUTH0_DOMAIN: origin });
    assert.equal(status, 1);
    const both = `AUTH0_DOMAIN is ${host} and AUTH0_MANAGEMENT_TOKEN is for ${new URL(tenant.origin).host}, `;
    assert.ok(output.startsWith(both) && !output.includes("\n"), output);
  }
  assert.deepEqual(requests, [[], []]);
});

/** auth0-action.js, with the line in force that limits it to one API. */
function limitedTo(identifier: string): string {
  return ACTION_CODE.replace(/^ *\/\/ (if \(event\.resource_server.*)"https:.*"(.*)$/m, `  $1"${identifier}"$2`);
}

/** Deploys an Action with this code, as the only one of the post-login flow. */
function setAction(code: string, name = "Add Scopes for ChatGPT"): void {
  tenant.settings.actions = [{ id: "act_1", name, code, deployed_version: { code } }];
  tenant.settings.flow = [{ id: "bnd_1", action: { id: "act_1" }, display_name: name }];
}

describe("Settings that are there already", () => {
  const OTHER = "https://other.example.com/mcp";
  const { settings } = tenant;
  const api = (change: Partial<Api>) => () => settings.apis.forEach((one) => Object.assign(one, change));
  const cases: Record<string, [change: () => void, line: string, said: RegExp]> = {
    "a Default Audience of another API": [
      () => settings.defaultAudience = OTHER,
      "2 audience",
      /Default Audience is https:\/\/other\.example\.com\/mcp, on which other applications may depend Take a tenant/,
    ],
    "an Action of the same name with other code": [
      () => setAction("other"),
      "4 Action",
      /is there, with other code than auth0-action\.js Look at it under Actions → Library/,
    ],
    "an Action of the same name that is limited to another API": [
      () => setAction(limitedTo(OTHER)),
      "4 Action",
      /is there, limited to the API https:\/\/other\.example\.com\/mcp Look at it under Actions → Library/,
    ],
    "an Action of the same name with code in the place of the API": [
      () => setAction(limitedTo(`${SERVER_URL}" + api.access.deny("x") + "`)),
      "4 Action",
      /is there, with other code than auth0-action\.js/,
    ],
    "a grant of Default Permissions with other scopes": [
      api({ defaultPermissionsForThirdPartyApplications: ["tasks:read"] }),
      "1 Default Permissions",
      /tasks:read, where tasks:read tasks:write is needed .* take another MCP_SERVER_URL/,
    ],
    "an API that signs with HS256": [
      api({ signingAlgorithm: "HS256" }),
      "1 API",
      /it signs with HS256, and the server takes RS256 alone .* take another MCP_SERVER_URL/,
    ],
    "an API that encrypts its tokens": [api({ encryptsTokens: true }), "1 API", /it encrypts its tokens \(JWE\)/],
    "an API that no application may call for a user": [
      api({ userAccessPolicy: "deny_all" }),
      "1 API",
      /lets no application call it on behalf of a user/,
    ],
  };
  for (const [name, [change, line, said]] of Object.entries(cases)) {
    test(`setup does not overwrite ${name}, and says what a person can choose`, async () => {
      reset(tenant, configuredTenant(line.includes("Default Permissions") ? "strict" : "permissive", SERVER_URL));
      change();
      const before = structuredClone(settings);
      const report = await apply();
      assert.deepEqual([report.status, left(report)], [1, [`by hand: ${line}`]]);
      assert.match(report.output, /Nothing was changed: do the first one that is by hand, and run this again\.$/);
      assert.match(report.lines.find(({ mark }) => mark === "by hand")?.said ?? "", said);
      assert.deepEqual(settings, before);
    });
  }

  test("setup makes the settings before the first one that only a person can make, and none after it", async () => {
    reset(tenant, { kind: "permissive", defaultAudience: OTHER });
    const { status, output } = await apply();
    assert.equal(status, 1);
    assert.match(output, /Stopped at what is by hand: Step 2, audience\. Run this again when it is done\.$/);
    assert.deepEqual([settings.apis.length, settings.connections[0]?.domainLevel], [1, false]);
  });

  test("setup reads the tenant again after the person says yes, and keeps what has changed since", async () => {
    reset(tenant, configuredTenant("permissive", SERVER_URL, "register", "default-audience"));
    const ask = () => Promise.resolve(Boolean(settings.defaultAudience = OTHER));
    assert.equal((await runSetup(tenant, { ...REGISTER, apply: true }, { ask })).status, 1);
    assert.equal(settings.resourceParameterCompatibilityProfile, false);
  });

  test("setup keeps the API's other permissions when it adds its own", async () => {
    reset(tenant, configuredTenant("permissive", SERVER_URL));
    settings.apis.forEach((api) => api.permissions = ["notes:read", "tasks:read"]);
    assert.equal((await apply()).status, 0);
    assert.deepEqual(settings.apis[0]?.permissions, ["notes:read", "tasks:read", "tasks:write"]);
  });
});

test("setup makes the grant that a new API requires in the same run", async () => {
  reset(tenant);
  tenant.beforeManagement = async (request, answer) => {
    const response = await answer();
    if (request !== "POST resource-servers") return response;
    tenant.settings.apis.forEach((api) => api.userAccessPolicy = "require_client_grant");
    return response;
  };
  const { status, output } = await apply();
  assert.equal(status, 0, output);
  assert.match(output, /^done {5}Step 1 {3}Default Permissions: tasks:read tasks:write$/m);
});

describe("The post-login flow", () => {
  const { settings } = tenant;
  const ours = { id: "act_ours", name: "ChatGPT scopes", code: ACTION_CODE.replaceAll("\n", "\r\n") };
  const withoutAction = () => reset(tenant, configuredTenant("permissive", SERVER_URL, "register", "action"));

  test("setup adds the Action after all others of the flow, several pages of them, in their order", async () => {
    withoutAction();
    const others = Array.from({ length: 70 }, (_, number) => `Other ${number}`);
    settings.actions = others.map((name) => ({ id: name, name, code: "other", deployed_version: { code: "other" } }));
    settings.flow = others.map((name) => ({ id: `bnd_${name}`, action: { id: name }, display_name: name }));
    const before = [...settings.flow];
    assert.equal((await apply()).status, 0);
    assert.deepEqual(settings.flow.slice(0, 70), before);
    assert.deepEqual(settings.flow.slice(70).map((binding) => binding.display_name), ["Add Scopes for ChatGPT"]);
    assert.equal(settings.postLoginAction, true);
  });

  const unfinished: Record<string, [deployedCode: string | undefined, isInFlow: boolean]> = {
    "pasted by hand and not deployed": [undefined, false],
    "deployed and not in the flow": [ACTION_CODE, false],
    "in the flow with older code": ["older", true],
  };
  for (const [state, [deployedCode, isInFlow]] of Object.entries(unfinished)) {
    test(`setup completes an Action of any name that is ${state}`, async () => {
      withoutAction();
      settings.actions = [{ ...ours, ...(deployedCode !== undefined && { deployed_version: { code: deployedCode } }) }];
      settings.flow = isInFlow ? [{ id: "bnd_ours", action: { id: ours.id }, display_name: "ours" }] : [];
      assert.deepEqual(left(await show()), ["to do: 4 Action"]);
      assert.equal((await apply()).status, 0);
      assert.deepEqual(settings.actions.map(({ id }) => id), [ours.id]);
      assert.deepEqual(settings.flow.map(({ action }) => action.id), [ours.id]);
    });
  }

  const pasted = {
    "without the file's head comment, as the README shows it,": ACTION_CODE.replace(/^\/\*\*.*?\*\/\n/s, ""),
    "with other comments, and blanks at line ends,": `// Ours\n\n${ACTION_CODE.replaceAll(";\n", '; // "\t\n')}`,
    "with the line that limits it to this API": limitedTo(SERVER_URL),
    "with the README's line for an e-mail in the profile": ACTION_CODE.replace(
      "\n};",
      '\n  api.accessToken.setCustomClaim("https://your-domain.com/email", event.user.email);\n};',
    ),
  };
  for (const [name, code] of Object.entries(pasted)) {
    test(`setup recognizes the Action ${name} and leaves it as it is`, async () => {
      assert.notEqual(code, ACTION_CODE);
      withoutAction();
      setAction(code, "Of any name");
      const report = await show();
      assert.deepEqual([report.status, left(report)], [0, []], report.output);
    });
  }

  test("setup stops after half a minute where Auth0 does not build the Action", async () => {
    withoutAction();
    settings.actions = [{ ...ours, building: 100 }];
    const { status, output, waited } = await apply();
    assert.deepEqual([status, waited.length], [1, 30]);
    assert.match(output, /actions\/actions\/act_ours is not ready after half a minute/);
  });
});

describe("Connections", () => {
  const { settings } = tenant;
  const promoted = () => settings.connections.filter(({ domainLevel }) => domainLevel).map(({ name }) => name);
  const severalConnections = () => {
    const names = Array.from({ length: 120 }, (_, number) => `Connection-${number}`);
    reset(tenant, configuredTenant("strict", SERVER_URL));
    settings.connections = names.map((name) => ({ name, domainLevel: false }));
  };

  test("setup promotes none of several connections unless one is named", async () => {
    severalConnections();
    const { status, output } = await apply();
    assert.equal(status, 1);
    assert.match(output, /none\n +Choose one with --connection NAME: Connection-0, .*, Connection-119$/m);
    assert.deepEqual(promoted(), []);
  });

  test("setup promotes the named one of several connections, on whatever page of Auth0's list it is", async () => {
    severalConnections();
    assert.equal((await apply({ connection: "Connection-119" })).status, 0);
    assert.deepEqual(promoted(), ["Connection-119"]);
  });

  test("setup accepts a connection that is promoted already, unless another is named", async () => {
    severalConnections();
    Object.assign(settings.connections[110] ?? {}, { domainLevel: true });
    assert.equal((await show()).status, 0);
    assert.equal((await apply({ connection: "Connection-3" })).status, 0);
    assert.deepEqual(promoted(), ["Connection-3", "Connection-110"]);
  });

  test("setup refuses an unknown connection, and lists the known ones or says where to create one", async () => {
    severalConnections();
    const { status, output } = await apply({ connection: "Conection-3" });
    assert.equal(status, 1);
    assert.match(output, /none is called Conection-3\n +Choose one with --connection NAME: Connection-0/);
    settings.connections = [];
    assert.match((await show()).output, /none\n +Create one: Authentication → Database or Social$/m);
  });
});
