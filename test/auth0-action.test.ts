import assert from "node:assert/strict";
import { test } from "node:test";
import { loadAction, OIDC_SCOPES } from "./support/tenant.ts";

/** Runs the Action once, and says which scopes it added. */
async function run(event: Parameters<ReturnType<typeof loadAction>>[0]): Promise<string[]> {
  const added: string[] = [];
  await loadAction()(event, { accessToken: { addScope: (scope) => added.push(scope) } });
  return added;
}

test("the Action runs as CommonJS without anything to require", () => {
  assert.equal(typeof loadAction(), "function");
});

test("the Action grants every scope that Auth0 advertises when all of them were asked for", async () => {
  assert.deepEqual(await run({ transaction: { requested_scopes: OIDC_SCOPES } }), OIDC_SCOPES);
});

test("the Action grants no OIDC scope that was not asked for", async () => {
  assert.deepEqual(await run({ transaction: { requested_scopes: ["offline_access", "openid"] } }), [
    "openid",
    "offline_access",
  ]);
  assert.deepEqual(await run({ transaction: { requested_scopes: [] } }), []);
});

test("the Action grants no permission of an API, whoever asks", async () => {
  assert.deepEqual(await run({ transaction: { requested_scopes: ["tasks:write", "email", "admin"] } }), ["email"]);
});

test("the Action grants all OIDC scopes where Auth0 does not say what was asked", async () => {
  assert.deepEqual(await run({}), OIDC_SCOPES);
  assert.deepEqual(await run({ transaction: { protocol: "oauth2-refresh-token" } }), OIDC_SCOPES);
});
